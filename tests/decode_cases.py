"""Products of the decode family with tiles of one's own: what its GPU tests and sanitize.py draw.

product = Product(draw(config, m, seed, "cuda"))
product.check(product(tile))
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from compat import make_config
from problems import Problem, draw, relative_error, tolerance

from bitblas import reference
from bitblas.config import ZEROS_MODES, MatmulConfig
from bitblas.formats import FORMATS, Table
from bitblas.kernels import decode
from bitblas.kernels.decode import Tile
from bitblas.kernels.launch import Launch
from bitblas.kernels.prepared import Prepared, execute

DTYPES = ("float16", "bfloat16")
# (activation, weight, zeros mode) of all that the family could serve
COMBINATIONS = [
    (a, w, zeros)
    for a in DTYPES
    for w, fmt in FORMATS.items()
    if not fmt.is_dense
    for zeros in (None, *(ZEROS_MODES if fmt.is_integer else ()))
]
ROWS = {1: (1,), 8: (2, 5, 8), 16: (9, 16)}  # rows of A that share a kernel
MARGIN = 128  # bytes around an operand, so that it stays aligned


def drawn_config(rng: random.Random, a: str, w: str, zeros: str | None) -> MatmulConfig:
    """Any product of the combination that the family serves, of odd sizes mostly."""
    fmt = FORMATS[w]
    group = fmt.fixed_group_size or rng.choice((16, 32, 64, 128, 256, -1))
    if group == -1:
        k = rng.choice((16, 17, 70, 100, 128, 1440, 4096, 4096 + 160))
    else:
        k = group * rng.choice([n for n in (1, 2, 3, 5, 9, 17, 33, 133) if n * group <= 4352])
    # entries of tables are rounded: a few sums of them may cancel to less than the error
    n = rng.choice((64, 200, 1003) if isinstance(fmt.decoder, Table) else (1, 17, 64, 200, 1003))
    config = make_config(
        a, w, zeros, N=n, K=k, group_size=group, with_scaling=rng.random() < 0.75,
        with_bias=rng.random() < 0.5,
    )  # fmt: skip
    outs = [replace(config, out_dtype=out) for out in ("float16", "bfloat16", "float32")]
    if fmt.bits == 8 and not config.with_scaling and k > 1024:
        outs = outs[1:]  # sums beyond the largest float16
    served = [config for config in outs if decode.serves(config, 1, 90)]
    assert served, f"not served: {config}"
    return rng.choice(served)


def drawn_tile(rng: random.Random, config: MatmulConfig, m: int) -> Tile:
    """Any tile that fits, from those whose blocks have one row tile to those that have all."""
    smallest = decode.smallest_unit(config)
    while True:
        bands = rng.choice((1, 2, 4))
        tiles = -(-config.N // (16 * bands))
        tile = Tile(
            warps=rng.choice((8, 16)),
            bands=bands,
            unit_k=rng.choice([unit for unit in (smallest, 64, 128, 256) if unit >= smallest]),
            depth=rng.choice((1, 2, 4, 8)),
            blocks=rng.choice((1, -(-tiles // 3), -(-tiles // 2), tiles, tiles + 3)),
            slabs=rng.choice((1, 1, 2, 3)),
        )
        if fits(config, m, tile):
            return tile


def fits(config: MatmulConfig, m: int, tile: Tile) -> bool:
    """Whether a block finds room for it: A in shared memory, the rest (about) in registers."""
    words = tile.bands * tile.depth * tile.unit_k * config.bits // 64  # of a lane
    scales = tile.bands * max(1, tile.depth * tile.unit_k // config.group_length)
    most = 32 if tile.warps == 16 else 64
    small = decode.shared_bytes(config, m, tile) <= decode.SHARED_BYTES
    return small and words <= most and scales <= most // 2


def surrounded(x: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """The same in the middle of memory full of NaN; shift: bytes past a multiple of 16."""
    size = x.numel() * x.itemsize
    memory = torch.full((size + 2 * MARGIN,), 255, dtype=torch.uint8, device=x.device)
    inside = memory[MARGIN + shift : MARGIN + shift + size]
    inside.copy_(x.contiguous().view(torch.uint8).flatten())
    return inside.view(x.dtype).view(x.shape)


def nothing_written_around(x: torch.Tensor) -> bool:
    """Whether the memory around a `surrounded` tensor is as it was."""
    memory = x._base
    assert memory is not None
    start = x.data_ptr() - memory.data_ptr()
    rest = memory[:start], memory[start + x.numel() * x.itemsize :]
    return all(bool((part == 255).all()) for part in rest)


class Product:
    """A problem with its weight packed; every operand and result lies between NaN.

    shift: bytes by which A misses a multiple of 16.
    """

    family: Any = decode

    def __init__(self, problem: Problem, shift: int = 0) -> None:
        self.problem, self.config = problem, problem.config
        self.A = surrounded(problem.A, shift)
        packed = self.family.layout(self.config).pack(problem.codes, self.config.bits)
        self.W = surrounded(packed)
        self.extras = {name: surrounded(x) for name, x in problem.extras().items()}

    def out(self, m: int | None = None) -> torch.Tensor:
        """A result to be written: NaN, as all around it."""
        shape = (self.A.shape[0] if m is None else m, self.config.N)
        out = surrounded(
            torch.empty(shape, dtype=self.config.torch_out_dtype, device=self.A.device)
        )
        return out.fill_(float("nan"))

    def launches(self, tile: Any, out: torch.Tensor, A: torch.Tensor | None = None) -> list[Launch]:
        A = self.A if A is None else A
        steps: list[Launch] = self.family.launches(
            self.config, A, self.W, out, **self.extras, tile=tile
        )
        return steps

    def __call__(self, tile: Any, A: torch.Tensor | None = None) -> torch.Tensor:
        out = self.out(None if A is None else A.shape[0])
        execute(self.launches(tile, out, A), out.device)
        assert nothing_written_around(out), f"written outside of the result: {tile} {self.config}"
        return out

    def first_rows(self, m: int) -> Product:
        """The product of the first m rows of A."""
        problem = replace(self.problem, A=self.problem.A[:m])
        product = type(self).__new__(type(self))
        product.__dict__ |= self.__dict__ | {"problem": problem, "A": self.A[:m]}
        return product

    def check(self, out: torch.Tensor, note: object = "") -> torch.Tensor:
        error = self.error(out)
        assert error <= tolerance(self.config), f"relative error {error}: {note} {self.config}"
        return out

    def error(self, out: torch.Tensor) -> float:
        """relative_error, where there are enough results for them not to be all near zero; else
        relative to what independent terms of the same size would add up to, if that is more."""
        expected = self.problem.expected()
        error = relative_error(out, expected)
        if expected.numel() >= 64:
            return error
        names = ("scale", "zeros", "global_scale")
        extras = {name: x for name, x in self.problem.extras().items() if name in names}
        weight = reference.dequantize(self.config, self.problem.codes, **extras)
        typical = (self.problem.A.double() ** 2 @ weight.double().T ** 2).sqrt().norm().item()
        norm = expected.norm().item()
        return error * norm / max(norm, typical)


def drawn(rng: random.Random, a: str, w: str, zeros: str | None, rows: int) -> tuple[Product, Tile]:
    """A product of rows (1, 8 or 16) rows of A and a tile for it, both at random, on the GPU."""
    config = drawn_config(rng, a, w, zeros)
    problem = draw(config, rows, rng.randrange(2**31), "cuda")
    shift = problem.A.itemsize if rng.random() < 0.1 else 0
    return Product(problem, shift), drawn_tile(rng, config, rows)


class Repeated:
    """A product prepared once, to be started in quick succession."""

    def __init__(self, product: Product, tile: Any) -> None:
        self.product, self._out = product, product.out()
        steps = product.launches(tile, self._out)
        values = [getattr(x, "base", x) for step in steps for x in step.arguments.values()]
        # by storage: an argument may be a view of an operand, or a TMA map of it beside itself
        self._operands = {_storage(x): x for x in values if isinstance(x, torch.Tensor)}
        places = {key: i for i, key in enumerate(self._operands)}
        device = torch.device("cuda", torch.cuda.current_device())
        self._prepared = Prepared(steps, device, len(places), lambda x: places[_storage(x)])

    def start(self, out: torch.Tensor, A: torch.Tensor | None = None, settled: bool = True) -> None:
        """Write the product of A (default: the problem's) to out. settled: see launch.Settled."""
        swaps = {_storage(self._out): out}
        if A is not None:
            swaps[_storage(self.product.A)] = A
        operands = [swaps.get(key, x) for key, x in self._operands.items()]
        self._prepared.run([x.data_ptr() for x in operands], settled)


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata

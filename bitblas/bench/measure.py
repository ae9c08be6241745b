"""All kernels of one product side by side, product after product."""

from __future__ import annotations

import dataclasses
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch

from .. import plan
from ..config import MatmulConfig
from ..matmul import Matmul
from ..operands import input_features
from ..precompile import compile_sources, warmup
from .cases import draw_activation, draw_weight, poisoned, relative_error, tolerance
from .peers import LEEWAY, Peer, Product, UnsupportedError
from .report import Report, Row
from .timing import Timer

Extras = dict[str, torch.Tensor]
OurProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Extras], Any]  # A, W, out, extras


class WrongResultError(Exception):
    """A product is not what the reference says."""


class DeviceLostError(Exception):
    """The GPU takes no more work from this process."""


def dense_dtype(A_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the dense product is computed in: A's dtype; for 8-bit A float16, float32 on a CPU."""
    if A_dtype.is_floating_point and A_dtype.itemsize > 1:
        return A_dtype
    return torch.float16 if device.type == "cuda" else torch.float32


def our_products(
    operator: Matmul, m: int, device: torch.device, all_tiles: bool
) -> Sequence[tuple[str, OurProduct]]:
    """(kernel, product): what serves a call, or, on a GPU, every tile that may."""

    def served(A: torch.Tensor, W: torch.Tensor, out: torch.Tensor, extras: Extras) -> Any:
        return operator(A, W, output=out, **extras)

    if device.type == "cpu":
        return [("bitblas", served)]
    config = operator.config
    if all_tiles:
        return _tiles(config, m, device)
    sections = plan.sections(config, m, device)
    return [(" + ".join(tile_name(family, tile) for family, tile, _ in sections), served)]


@dataclass(frozen=True)
class TileProduct:
    """A product by one tile of a kernel family."""

    config: MatmulConfig
    device: torch.device
    family: ModuleType
    tile: Any

    def launches(self, A: torch.Tensor, W: torch.Tensor, out: torch.Tensor, extras: Extras) -> Any:
        return self.family.launches(self.config, A, W, out, tile=self.tile, **extras)

    def __call__(self, A: torch.Tensor, W: torch.Tensor, out: torch.Tensor, extras: Extras) -> None:
        from ..kernels import prepared

        # nobody writes the weights, as when a model is served
        prepared.execute(self.launches(A, W, out, extras), self.device, settled=True)


def _tiles(config: MatmulConfig, m: int, device: torch.device) -> list[tuple[str, TileProduct]]:
    """The tiles of all families that serve a call."""
    return [
        (tile_name(family, tile), TileProduct(config, device, family, tile))
        for family, tile in plan.candidates(config, m, device)
    ]


def compile_tiles(products: Iterable[tuple[TileProduct, int]]) -> None:
    """Compile, in parallel, what the products (each with its rows of A) start."""
    from ..kernels import prepared
    from ..kernels.compile import Source

    sources = {}
    for product, m in products:
        for source in map(Source, product.launches(*_meta_operands(product.config, m))):
            sources[source.key] = source
    arch = prepared.architecture(torch.cuda.current_device())
    compile_sources(list(sources.values()), arch, os.cpu_count() or 1, progress=True)


def _meta_operands(
    config: MatmulConfig, m: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Extras]:
    """A, packed weight, result and extras as they are drawn for a GPU, without memory."""
    from ..kernels import portable

    def meta(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    extras: Extras = {}
    if config.with_scaling:
        extras["scale"] = meta((config.N, config.num_groups), config.scale_dtypes[0])
    if config.with_zeros:
        extras["zeros"] = meta(config.zeros_shape, config.zeros_dtypes[0])
    if config.format.has_global_scale:
        extras["global_scale"] = meta((1,), torch.float32)
    packed = meta(portable.layout(config).shape(config.bits, config.N, config.K), torch.int8)
    A = meta((m, input_features(config)), config.torch_A_dtype)
    return A, packed, meta((m, config.N), config.torch_out_dtype), extras


def tile_name(family: ModuleType, tile: Any) -> str:
    """The family and the tile's fields: "portable gemv 8 16 512 4 3 1"."""
    fields = (str(value) for value in dataclasses.astuple(tile))
    return " ".join([family.__name__.rpartition(".")[2], *fields])


@dataclass
class Variant:
    """A kernel whose result was right, ready to be timed. out: what it writes, if that is ours."""

    kernel: str
    error: float
    prepared: Any
    out: torch.Tensor | None = None


class Products:
    """One quantised weight in as many copies as cold calls need, for us, the peers and torch."""

    def __init__(self, config: MatmulConfig, timer: Timer, peers: Sequence[Peer]) -> None:
        device = timer.device
        self.config, self.timer = config, timer
        self.operator = Matmul(config, target="cpu" if device.type == "cpu" else None)
        self.weight = draw_weight(config, self.operator, device)
        count = timer.copies(self.weight.nbytes)
        self.copies = [self.weight.copy() for _ in range(count)]
        self.peers: dict[str, list[Product]] = {}
        self.unsupported: dict[str, str] = {}
        for peer in peers:
            try:
                self.peers[peer.name] = [peer.prepare(self.weight) for _ in range(count)]
            except UnsupportedError as reason:
                self.unsupported[peer.name] = str(reason)
            except Exception as error:  # another library's: whatever it raises, it is left out
                self.unsupported[peer.name] = _in_a_line(error)

    @cached_property
    def dense(self) -> list[torch.Tensor]:
        """The dequantised weight, in as many copies as cold calls need."""
        dtype = dense_dtype(self.config.torch_A_dtype, self.timer.device)
        weight = self.weight.exact.to(dtype)
        return [weight.clone() for _ in range(self.timer.copies(weight.nbytes))]

    def ours(
        self,
        A: torch.Tensor,
        products: Sequence[tuple[str, OurProduct]],
        fail: Callable[[Exception], None],
    ) -> list[Variant]:
        """Our products with A; `fail` hears of those that are wrong or do not run."""
        m, config, device = A.shape[0], self.config, self.timer.device
        result = []
        for name, product in products:
            try:
                out = poisoned((m, config.N), config.torch_out_dtype, device)
                product(A, self.weight.packed, out, self.weight.extras)
                error = self.check(out, A, tolerance(config), name)
                calls = [partial(product, A, W, out, extras) for W, extras in self.copies]
                result.append(Variant(name, error, self.timer.prepare(calls), out))
            except Exception as failure:
                fail(failure)
        return result

    def theirs(self, A: torch.Tensor, note: Callable[[str], None]) -> list[Variant]:
        """The peers' products; those that are wrong or do not run are noted and left out."""
        config, result = self.config, []
        for name, products in self.peers.items():
            try:
                # freed at once: the memory that the result may then take over
                poisoned((A.shape[0], config.N), config.torch_out_dtype, A.device)
                error = self.check(products[0](A), A, LEEWAY * tolerance(config), name)
                prepared = self.timer.prepare([partial(product, A) for product in products])
                result.append(Variant(name, error, prepared))
            except Exception as failure:  # another library's: whatever it raises, it is left out
                note(f"{name} left out ({config.W_dtype}, m = {A.shape[0]}): {_in_a_line(failure)}")
        return result

    def check(self, got: torch.Tensor, A: torch.Tensor, allowed: float, name: str) -> float:
        """The relative error of a product with A; raises WrongResultError where it is too large."""
        error = relative_error(got, A, self.weight)
        if not error <= allowed:
            raise WrongResultError(f"{name}: relative error {error:.1e}, allowed {allowed:.0e}")
        return error

    def dense_calls(self, m: int) -> Any:
        """torch.mm with the dequantised weight, prepared."""
        dtype, device = self.dense[0].dtype, self.timer.device
        A = torch.randn(m, self.config.K, device=device).to(dtype)
        out = torch.empty((m, self.config.N), dtype=dtype, device=device)
        return self.timer.prepare([partial(torch.mm, A, W.T, out=out) for W in self.dense])


class Suite:
    """A run over configs and row counts. What goes wrong in a case is kept in `failures`, and the
    other cases are timed all the same; `notes` say what was left out and why.

    budget: seconds after which no further case is started.
    """

    def __init__(
        self,
        timer: Timer,
        report: Report,
        peers: Sequence[Peer],
        all_tiles: bool = False,
        budget: float | None = None,
    ) -> None:
        self.timer, self.report, self.peers = timer, report, peers
        self.all_tiles = all_tiles
        self.stop_at = time.monotonic() + budget if budget is not None else float("inf")
        self.failures: list[str] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        if text not in self.notes:
            print(text, flush=True)
            self.notes.append(text)

    def fail(self, config: MatmulConfig, m: int | None, error: Exception) -> None:
        text = f"FAILED {config.W_dtype} x {config.A_dtype}, N={config.N}, K={config.K}"
        text += f", m={m}: {_in_a_line(error)}" if m is not None else f": {_in_a_line(error)}"
        print(text, flush=True)
        if not isinstance(error, WrongResultError):
            traceback.print_exception(error)
        self.failures.append(text)
        if self.timer.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as lost:
                raise DeviceLostError(str(lost)) from error

    def run(self, configs: Sequence[MatmulConfig], rows: Sequence[int]) -> None:
        """Time every config at every m of `rows`."""
        left = len(configs) * len(rows)
        if self.timer.device.type == "cuda" and not self.all_tiles:
            self._ahead(lambda: warmup(configs, rows, self.timer.device))
        try:
            for config in configs:
                if time.monotonic() > self.stop_at:
                    break
                left -= self._run_config(config, rows)
        except DeviceLostError as error:
            self.note(f"the GPU is lost to this process, the rest is not timed: {error}")
        if time.monotonic() > self.stop_at and left:
            self.note(f"{left} of {len(configs) * len(rows)} cases not started: budget spent")

    def _ahead(self, compile_all: Callable[[], None]) -> None:
        """Compile in parallel; a kernel that does not compile fails its own case later on."""
        try:
            compile_all()
        except Exception as error:
            self.note(f"not all kernels were compiled ahead: {_in_a_line(error)}")

    def _run_config(self, config: MatmulConfig, rows: Sequence[int]) -> int:
        """How many cases of the config are over."""
        try:
            products = Products(config, self.timer, self.peers)
        except Exception as error:
            self.fail(config, None, error)
            return len(rows)
        for name, reason in products.unsupported.items():
            self.note(f"{name} left out: {reason}")
        if self.timer.device.type == "cuda" and self.all_tiles:
            device = self.timer.device
            tiles = [(tile, m) for m in rows for _, tile in _tiles(config, m, device)]
            self._ahead(lambda: compile_tiles(tiles))
        for done, m in enumerate(rows):
            if time.monotonic() > self.stop_at:
                return done
            try:
                self._run_case(products, m)
            except DeviceLostError:
                raise
            except Exception as error:
                self.fail(config, m, error)
        return len(rows)

    def _run_case(self, products: Products, m: int) -> None:
        config, timer = products.config, self.timer
        A = draw_activation(config, m, timer.device)

        def fail(error: Exception) -> None:
            self.fail(config, m, error)

        ours = our_products(products.operator, m, timer.device, self.all_tiles)
        variants = products.ours(A, ours, fail)
        if not variants:
            return
        variants += products.theirs(A, self.note)
        prepared = [products.dense_calls(m), *(variant.prepared for variant in variants)]
        dense_us, *times = timer.medians(prepared)
        for variant, us in zip(variants, times):
            try:
                self._check_again(products, A, variant)
            except WrongResultError as error:
                fail(error)
                continue
            row = Row(
                config=config,
                m=m,
                us=us,
                dense_us=dense_us,
                read_us=timer.read(products.weight.nbytes),
                rel_err=variant.error,
                kernel=variant.kernel,
                weight_bytes=products.weight.nbytes,
                dense_weight_bytes=products.dense[0].nbytes,
                is_peer=variant.out is None,
            )
            self.report.add(row)

    def _check_again(self, products: Products, A: torch.Tensor, variant: Variant) -> None:
        """What a graph of many calls leaves behind: a race may not show in a single call."""
        if variant.out is not None:
            variant.out.copy_(poisoned(variant.out.shape, variant.out.dtype, variant.out.device))
            self.timer.run(variant.prepared)
            name = f"{variant.kernel}, after it was timed"
            products.check(variant.out, A, tolerance(products.config), name)


def _in_a_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = "" if isinstance(error, WrongResultError) else f"{type(error).__name__}: "
    return (name + text)[:300]

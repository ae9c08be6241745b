"""What is decided once for a config and reused by every call: kernels, sizes, work items."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from ..config import INTEGER_ACTIVATIONS, MatmulConfig
from . import decode, epilogue, integer, microkernel
from .decode import Weights
from .jit import Compiler, compiler
from .target import Target

# Up to here a block of weights is decoded in registers against all rows of A at once; above it is
# decoded into a panel first, and the panel kernel serves every larger m: handing float32 panels to
# torch's product was never faster. Zen 3, N = 2752, K = 4096, one thread: int4 at m = 128 takes
# 34 ms, torch's float32 product alone, of a weight decoded beforehand, 47 ms.
FUSED_ROWS = 4
PANEL_K = 256  # values of k in a panel: 16 KB of float32, half of a first-level cache
M_BLOCK = 192  # rows of A per pass over the weights: a chunk of them stays in the L2 cache
PANEL_BLOCKS = 8  # 16-row blocks that share one pass over a chunk of A
PARALLEL_PRODUCTS = 1 << 20  # fewer multiplications than this are not worth waking the pool

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int32: "int32",
    torch.int8: "int8",
}


@dataclass(frozen=True)
class Plan:
    """The kernels of one config with operands of given dtypes."""

    config: MatmulConfig
    weights: Weights
    target: Target

    @cached_property
    def compiler(self) -> Compiler:
        return compiler(self.target)

    @cached_property
    def is_integer(self) -> bool:
        return self.config.A_dtype in INTEGER_ACTIVATIONS

    @cached_property
    def exact(self) -> bool:
        """Integer operands throughout: int32 accumulators over all of K."""
        float_zeros = self.weights.zeros is not None
        return self.is_integer and self.weights.scale is None and not float_zeros

    @cached_property
    def groups(self) -> int:
        has_groups = self.weights.scale is not None or self.weights.zeros_mode is not None
        return self.config.num_groups if has_groups else 1

    @cached_property
    def k_padded(self) -> int:
        return -(-self.config.K // 32) * 32

    @cached_property
    def k_used(self) -> int:
        return self.k_padded if self.groups == 1 else self.config.K

    @cached_property
    def group(self) -> int:
        return self.k_used // self.groups

    @cached_property
    def unit(self) -> int:
        """Values of k in one step of a float kernel: at most 32, and whole words and groups."""
        smallest = decode.smallest_unit(self.config.bits)
        return next((u for u in (32, 16, 8) if u >= smallest and self.group % u == 0), smallest)

    @cached_property
    def is_fast(self) -> bool:
        """Whether the kernels serve it. Not: groups that end inside a word (or, for integer
        activations, inside 32 values of k), and tables of more than 16 entries."""
        if not decode.is_supported(self.config.format):
            return False
        return self.group % (integer.UNIT if self.is_integer else self.unit) == 0

    @cached_property
    def run(self) -> int:
        """Values of k that the panel decoder takes under one scale."""
        if self.groups == 1:
            return PANEL_K
        largest = min(self.group, PANEL_K)
        sizes = range(largest // self.unit * self.unit, 0, -self.unit)
        return next(size for size in sizes if self.group % size == 0)

    @cached_property
    def chunk(self) -> int:
        return self.run * max(1, PANEL_K // self.run)

    @cached_property
    def blocks(self) -> int:
        """Blocks of 16 weight rows."""
        return -(-self.config.N // 16)

    @cached_property
    def tile_widths(self) -> tuple[int, ...]:
        return microkernel.tile_widths(self.target)

    def padded_rows(self, m: int) -> int:
        """Rows of packed A: full tiles and one narrower tile that holds the rest."""
        full, rest = divmod(m, self.tile_widths[-1])
        narrow = next(width for width in (0, *self.tile_widths) if width >= rest)
        return full * self.tile_widths[-1] + narrow

    def integer_tile(self, m: int) -> int:
        """Rows of A in a register tile of the integer kernel."""
        widths = (1, 2, 4, 8) if self.target.has("avx512f") else (1, 2, 4)
        return next((width for width in widths if width >= m), widths[-1])

    @cached_property
    def integer_unit_bytes(self) -> int:
        return integer.unit_bytes(self.target, self.config.bits)

    @cached_property
    def a_factors(self) -> torch.Tensor | None:
        """Factors of the columns of A, (k_used,) float32, that the fused kernel asks for."""
        if not decode.is_placed(self.weights):
            return None
        shifts = [decode.placed_shift(self.weights, k) for k in range(32)]
        if not any(shifts):
            return None
        factors = torch.tensor([2.0**-shift for shift in shifts], device="cpu")
        return factors.repeat(self.k_padded // 32)[: self.k_used]

    def table_floats(self, m: int) -> int:
        """Length of the tables that replace m rows of A in the fused kernel; 0: they do not."""
        width = decode.index_bits(self.target, self.weights, m)
        if not width:
            return 0
        words = self.k_used * self.weights.bits // 32
        return words * len(decode.sum_tables(width, self.weights)) << width

    # -- function addresses
    def fused(self, m: int) -> int:
        return self.compiler.address(microkernel.fused, self.weights, m, self.unit)

    @cached_property
    def pack_tables(self) -> int:
        return self.compiler.address(microkernel.pack_tables, self.weights)

    @cached_property
    def decode_panel(self) -> int:
        return self.compiler.address(microkernel.decode_panel, self.weights, self.unit)

    @cached_property
    def panel(self) -> int:
        return self.compiler.address(microkernel.panel)

    @cached_property
    def gemm(self) -> int:
        return self.compiler.address(microkernel.gemm)

    @cached_property
    def pack(self) -> int:
        return self.compiler.address(microkernel.pack)

    def fused_integer(self, tile: int) -> int:
        return self.compiler.address(integer.fused_integer, self.weights, tile, self.exact)

    def pack_integer(self, tile: int) -> int:
        return self.compiler.address(integer.pack_integer, self.config.bits, tile)

    def epilogue(self, accumulator: str, exact: bool) -> int:
        out = self.config.out_dtype
        return self.compiler.address(epilogue.epilogue, accumulator, out, exact)

    def dequantize(self, out: str) -> int:
        return self.compiler.address(epilogue.dequantize, out)


@lru_cache(maxsize=4096)
def plan_for(
    config: MatmulConfig,
    scale: torch.dtype | None,
    zeros: torch.dtype | None,
    target: Target | None = None,
) -> Plan:
    """The plan for operands of these dtypes (None: not given)."""
    scale_name = zeros_name = mode = None
    if scale is not None:
        scale_name = config.format.scale_encoding or DTYPE_NAMES[scale]
    if zeros is not None:
        mode = config.zeros_mode
        zeros_name = None if mode == "quantized" else DTYPE_NAMES[zeros]
    weights = Weights(config.W_dtype, scale_name, mode, zeros_name)
    return Plan(config, weights, target or Target.host())

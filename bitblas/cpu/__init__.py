"""The CPU backend: products with packed low-bit weights, compiled at first use by llvmlite.

The caller has validated every operand. docs/design.md tells how the kernels work.
"""

from __future__ import annotations

import torch

from ..config import MatmulConfig
from . import threads
from .ir import Field
from .plan import FUSED_ROWS, M_BLOCK, PANEL_BLOCKS, PARALLEL_PRODUCTS, Plan, plan_for
from .quantize import quantize_activation
from .slow import dequantize_slow, matmul_slow, unpack_int4
from .target import Target

__all__ = ["dequantize", "matmul", "quantize_activation"]


def matmul(
    config: MatmulConfig,
    A: torch.Tensor,
    W: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    *,
    target: Target | None = None,
) -> None:
    """out = A · W^T, as reference.matmul defines it.

    A: (m, K) contiguous, of config.torch_A_dtype (int4: (m, K/2) int8).  W: packed, Row16.
    out: (m, N) contiguous, of config.torch_out_dtype.  input_scale: (m,) float32, a factor of each
    row.  scale, zeros, bias, global_scale: contiguous, as the specification of the format says.
    target: the instruction set to compile for (default: this machine's); tests set it.
    """
    plan = plan_for(
        config,
        None if scale is None else scale.dtype,
        None if zeros is None else zeros.dtype,
        target,
    )
    if config.A_dtype == "int4":
        A = unpack_int4(A)
    if not plan.is_fast:
        matmul_slow(config, A, W, out, scale, zeros, bias, input_scale, global_scale)
        return
    m = A.shape[0]
    call = _Call(plan, m, W, out, scale, zeros, input_scale, global_scale)
    if plan.is_integer:
        call.integer(A, bias)
        return
    if bias is not None:
        bias = bias.to(torch.float32)
        call.fields[Field.BIAS] = bias.data_ptr()
    call.fields[Field.EPILOGUE] = plan.epilogue("float32", False)
    A = A.to(torch.float32)
    if m <= FUSED_ROWS:
        call.fused(A)
    else:
        call.panel(A)


def dequantize(
    config: MatmulConfig,
    W: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    *,
    target: Target | None = None,
) -> None:
    """out (N, K), float16, bfloat16 or float32 = the weight that packed W and extras stand for."""
    plan = plan_for(
        config,
        None if scale is None else scale.dtype,
        None if zeros is None else zeros.dtype,
        target,
    )
    if not plan.is_fast:
        dequantize_slow(config, W, out, scale, zeros, global_scale)
        return
    call = _Call(plan, 1, W, out, scale, zeros, None, global_scale)
    call.dequantize(str(out.dtype).removeprefix("torch."))


class _Call:
    """One call of a plan's kernels: the fields they read, and the tensors kept alive meanwhile."""

    def __init__(
        self,
        plan: Plan,
        m: int,
        W: torch.Tensor,
        out: torch.Tensor,
        scale: torch.Tensor | None,
        zeros: torch.Tensor | None,
        input_scale: torch.Tensor | None,
        global_scale: torch.Tensor | None,
    ):
        self.plan, self.m, self.out = plan, m, out
        config = plan.config
        self.fields = fields = [0] * len(Field)
        fields[Field.M] = m
        fields[Field.N] = config.N
        fields[Field.K] = config.K
        fields[Field.K_PADDED] = plan.k_padded
        fields[Field.K_USED] = plan.k_used
        fields[Field.GROUP] = plan.group
        fields[Field.GROUPS] = plan.groups
        fields[Field.W] = W.data_ptr()
        fields[Field.OUT] = out.data_ptr()
        if scale is not None:
            fields[Field.SCALE] = scale.data_ptr()
        if zeros is not None:
            fields[Field.ZEROS] = zeros.data_ptr()
            fields[Field.ZEROS_STRIDE] = zeros.shape[1]
        if input_scale is not None:
            fields[Field.ROW_SCALE] = input_scale.data_ptr()
        if global_scale is not None:
            fields[Field.TENSOR_SCALE] = global_scale.data_ptr()
        products = m * config.N * plan.k_padded
        self.threads = torch.get_num_threads() if products >= PARALLEL_PRODUCTS else 1

    def _run(self, address: int, items: int, fields: list[int] | None = None) -> None:
        fields = fields or self.fields
        fields[Field.ITEMS] = items
        threads.run(address, fields, max(1, min(self.threads, items)))

    def _items_of_blocks(self) -> int:
        """Split the weight into a few items per thread: even, yet long streams of memory."""
        blocks = self.plan.blocks
        per_item = -(-blocks // (8 * self.threads)) if self.threads > 1 else blocks
        self.fields[Field.BLOCKS] = per_item
        return -(-blocks // per_item)

    def _pad(self, A: torch.Tensor) -> torch.Tensor:
        extra = self.plan.k_used - A.shape[1]
        return torch.nn.functional.pad(A, (0, extra)) if extra else A

    def fused(self, A: torch.Tensor) -> None:
        """A few rows of float32 A."""
        plan, A = self.plan, self._pad(A)
        if size := plan.table_floats(self.m):
            tables = torch.empty(size, dtype=torch.float32, device="cpu")
            packing = list(self.fields)
            packing[Field.A], packing[Field.OUT] = A.data_ptr(), tables.data_ptr()
            self._run(plan.pack_tables, plan.groups, packing)
            A = tables
        elif plan.a_factors is not None:
            A = A * plan.a_factors
        self.fields[Field.A] = A.data_ptr()
        self.fields[Field.A_STRIDE] = 4 * plan.k_used
        self._run(plan.fused(self.m), self._items_of_blocks())

    def panel(self, A: torch.Tensor) -> None:
        """Any number of rows of float32 A, packed into tiles first."""
        plan, fields, m = self.plan, self.fields, self.m
        rows = m // M_BLOCK * M_BLOCK + plan.padded_rows(m % M_BLOCK)
        m_blocks = -(-m // M_BLOCK)
        packed = torch.empty(rows * plan.k_used, dtype=torch.float32, device="cpu")
        fields[Field.M_BLOCK] = M_BLOCK
        fields[Field.CHUNK], fields[Field.RUN] = plan.chunk, plan.run
        packing = list(fields)
        packing[Field.A], packing[Field.OUT] = A.data_ptr(), packed.data_ptr()
        self._run(plan.pack, m_blocks * -(-plan.k_used // plan.chunk), packing)

        per_item = min(PANEL_BLOCKS, -(-plan.blocks // self.threads))
        slot = plan.chunk * 64 + per_item * min(rows, M_BLOCK) * 64
        scratch = torch.empty(slot * self.threads, dtype=torch.int8, device="cpu")
        fields[Field.A], fields[Field.BLOCKS] = packed.data_ptr(), per_item
        fields[Field.SCRATCH], fields[Field.SCRATCH_STRIDE] = scratch.data_ptr(), slot
        fields[Field.DECODE], fields[Field.GEMM] = plan.decode_panel, plan.gemm
        self._run(plan.panel, m_blocks * -(-plan.blocks // per_item))

    def integer(self, A: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Any number of rows of int8 A."""
        plan, fields = self.plan, self.fields
        to_integer = not plan.config.torch_out_dtype.is_floating_point
        exact = plan.exact and to_integer and not fields[Field.ROW_SCALE]
        if bias is not None:
            bias = bias.to(torch.int32 if exact else torch.float32)
            fields[Field.BIAS] = bias.data_ptr()
        fields[Field.EPILOGUE] = plan.epilogue("int32" if plan.exact else "float32", exact)
        A = self._pad(A)
        tile = plan.integer_tile(self.m)
        tiles = -(-self.m // tile)
        unit_bytes = plan.integer_unit_bytes
        packed = torch.empty(
            tiles * tile * plan.k_padded // 32 * unit_bytes, dtype=torch.int8, device="cpu"
        )
        sums = torch.empty(tiles * tile * plan.groups, dtype=torch.int32, device="cpu")
        fields[Field.A_STRIDE] = plan.k_padded
        fields[Field.SUMS] = sums.data_ptr()
        packing = list(fields)
        packing[Field.A], packing[Field.OUT] = A.data_ptr(), packed.data_ptr()
        self._run(plan.pack_integer(tile), tiles, packing)
        fields[Field.A] = packed.data_ptr()
        self._run(plan.fused_integer(tile), self._items_of_blocks())

    def dequantize(self, out: str) -> None:
        plan, fields = self.plan, self.fields
        slot = plan.chunk * 64
        scratch = torch.empty(slot * self.threads, dtype=torch.int8, device="cpu")
        fields[Field.CHUNK], fields[Field.RUN] = plan.chunk, plan.run
        fields[Field.SCRATCH], fields[Field.SCRATCH_STRIDE] = scratch.data_ptr(), slot
        fields[Field.DECODE] = plan.decode_panel
        self._run(plan.dequantize(out), plan.blocks * -(-plan.k_used // plan.chunk))

"""Which products are timed: configs, random operands, and what the results must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .. import reference
from ..config import FLOAT_ACTIVATIONS, INTEGER_ACTIVATIONS, MatmulConfig, weight_dtypes
from ..formats import FORMATS, WeightFormat
from ..matmul import Matmul

CHECKED_ROWS = 64  # of A, from both ends: float64 products of more are slow
LARGEST_VALUE = 448  # of drawn fp8 weights: no NaN, and sums that float16 holds
SWEEP = sorted({round(2 ** (step / 5)) for step in range(71)})  # m from 1 to 16384


def quantised_formats(A_dtype: str) -> list[str]:
    """The registered formats, dense ones aside, that go with an activation dtype."""
    return [name for name in weight_dtypes(A_dtype) if not FORMATS[name].is_dense]


def default_group(fmt: WeightFormat) -> int:
    """The group that a format usually has: its own, 64 for nf4, none for fp8, else 128."""
    if fmt.fixed_group_size:
        return fmt.fixed_group_size
    if fmt.source_format.startswith("fp_"):
        return -1
    return 64 if fmt.source_format == "nf" else 128


def make_config(
    W_dtype: str,
    A_dtype: str,
    n: int,
    k: int,
    *,
    group: int | None = None,
    zeros: bool | None = None,
    scaling: bool = True,
    out_dtype: str | None = None,
) -> MatmulConfig:
    """The config of a product. zeros: None gives them to uint formats with floating activations.

    Raises ValueError for what does not go together.
    """
    fmt = FORMATS[W_dtype]
    if zeros is None:
        zeros = scaling and fmt.source_format == "uint" and A_dtype in FLOAT_ACTIVATIONS
    if out_dtype is None:
        out_dtype = A_dtype if A_dtype in FLOAT_ACTIVATIONS else "float16"
        if A_dtype in INTEGER_ACTIVATIONS and not scaling:
            out_dtype = "int32"
    group_size = group if group is not None and not fmt.fixed_group_size else default_group(fmt)
    return MatmulConfig(
        N=n,
        K=k,
        A_dtype=A_dtype,
        W_dtype=W_dtype,
        out_dtype=out_dtype,
        group_size=group_size if scaling else -1,
        with_scaling=scaling,
        with_zeros=zeros and fmt.is_integer,
    )


def tolerance(config: MatmulConfig) -> float:
    """The largest relative Frobenius error that docs/formats.md allows."""
    if not config.torch_out_dtype.is_floating_point:
        return 0.0
    if config.out_dtype == "float32":
        return 1e-5 if config.A_dtype in ("float32", *INTEGER_ACTIVATIONS) else 1e-3
    return 4e-3 if config.out_dtype == "bfloat16" else 1e-3


@dataclass
class Weight:
    """A random quantised weight with its extras. codes: uint8 (N, K)."""

    config: MatmulConfig
    codes: torch.Tensor
    packed: torch.Tensor
    extras: dict[str, torch.Tensor]  # scale, zeros, global_scale as far as there are any

    @cached_property
    def exact(self) -> torch.Tensor:
        """(N, K) in float64."""
        return reference.dequantize(self.config, self.codes, **self.extras)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and its extras: what a product must read at least."""
        return self.packed.nbytes + sum(x.nbytes for x in self.extras.values())

    def copy(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same packed weight and extras, elsewhere in memory."""
        return self.packed.clone(), {name: x.clone() for name, x in self.extras.items()}


def draw_weight(
    config: MatmulConfig, operator: Matmul, device: torch.device, gain: float = 8.0
) -> Weight:
    """Uniform codes; scales such that results are about `gain` times as large as activations."""
    values = torch.tensor(config.format.code_values(), dtype=torch.float64)
    usable = (values.abs() <= LARGEST_VALUE).nonzero().flatten().to(device, torch.uint8)
    shape = (config.N, config.K)
    codes = usable[torch.randint(0, len(usable), shape, dtype=torch.int32, device=device)]
    transform = operator.weight_transform
    assert transform is not None
    packed = transform(codes)
    extras: dict[str, torch.Tensor] = {}
    groups = (config.N, config.num_groups)
    spread = float(values[usable.cpu().long()].square().mean()) * config.K / gain**2
    if config.with_zeros:
        zeros = torch.randint(int(values.min()), int(values.max()) + 1, groups, device=device)
        extras["zeros"] = zeros.to(config.zeros_dtypes[0])
        spread *= 2
    if config.with_scaling:
        scale = torch.rand(groups, device=device) + 0.5
        if config.format.scale_encoding is None:
            scale /= spread**0.5
        extras["scale"] = scale.to(config.scale_dtypes[0])
    if config.format.has_global_scale:
        extras["global_scale"] = (torch.rand(1, device=device) + 0.5) / spread**0.5
    return Weight(config, codes, packed, extras)


def draw_activation(config: MatmulConfig, m: int, device: torch.device) -> torch.Tensor:
    """(m, K) of N(0, 1), or integers over the whole range; int4 packed to (m, K/2)."""
    if config.A_dtype in INTEGER_ACTIVATIONS:
        width = config.K // (2 if config.A_dtype == "int4" else 1)
        return torch.randint(-128, 128, (m, width), dtype=torch.int8, device=device)
    return torch.randn(m, config.K, device=device).to(config.torch_A_dtype)


def relative_error(got: torch.Tensor, A: torch.Tensor, weight: Weight) -> float:
    """||got - exact|| / ||exact|| over the first and the last rows of the product with A."""
    m = A.shape[0]
    rows = torch.arange(m, device=A.device)
    if m > CHECKED_ROWS:
        rows = torch.cat((rows[: CHECKED_ROWS // 2], rows[-CHECKED_ROWS // 2 :]))
    chosen = A.view(torch.uint8)[rows].view(A.dtype)  # fp8 cannot be indexed
    if weight.config.A_dtype == "int4":
        chosen = reference.unpack_int4(chosen)
    exact = chosen.to(torch.float64) @ weight.exact.T
    return float((got[rows].to(torch.float64) - exact).norm() / exact.norm())


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that no product gives: what is not written over shows."""
    value = float("nan") if dtype.is_floating_point else 77
    return torch.full(tuple(shape), value, dtype=dtype, device=device)

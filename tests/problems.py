"""Random problems for the tests of every backend: operands for a config, and the float64 answer.

problem = draw(config, m=5, seed=0, device="cuda")
out = operator(problem.A, packed(problem.codes), **problem.extras())
assert relative_error(out, problem.expected()) <= tolerance(config)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bitblas import reference
from bitblas.config import INTEGER_ACTIVATIONS, TORCH_DTYPES, MatmulConfig
from bitblas.layouts import pack_rows

LARGEST_FLOAT_VALUE = 8.0  # of drawn 8-bit float weights: keeps float16 results far from overflow


@dataclass
class Problem:
    """Operands of one product, all on one device; None where the config has no such operand.

    A: (m, K), int4: (m, K/2), layouts "tn" and "tt": (K, m).   codes: uint8 (N, K); dense pairs:
    values.   scale, zeros, bias, input_scale (m,), global_scale (1,): as the specification says.
    """

    config: MatmulConfig
    A: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None

    def extras(self) -> dict[str, torch.Tensor]:
        """The optional operands that are there, by name."""
        names = ("scale", "zeros", "bias", "input_scale", "global_scale")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def reference(self) -> torch.Tensor:
        """The product (m, N) in float64, before conversion to out_dtype."""
        return reference.matmul(self.config, self.A, self.codes, **self.extras())

    def expected(self) -> torch.Tensor:
        """reference() as out_dtype can hold it: integers rounded half to even and saturated."""
        result = self.reference()
        dtype = self.config.torch_out_dtype
        if dtype.is_floating_point:
            return result
        limits = torch.iinfo(dtype)
        return result.round().clamp(limits.min, limits.max)


def draw(
    config: MatmulConfig,
    m: int,
    seed: int,
    device: str | torch.device = "cpu",
    *,
    with_input_scale: bool = False,
    scale_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
) -> Problem:
    """A random problem with m rows; the same seed gives the same operands on every device.

    A is about N(0, 1) (integers: the whole range), weights are uniform over the codes, scales lie
    in 0.01..0.1, zeros in the range of the weight's values. scale_dtype: one of
    config.scale_dtypes (default: the first); bias_dtype: default out_dtype.
    """
    rng = torch.Generator().manual_seed(seed)
    scale = _draw_scale(config, rng, scale_dtype) if config.with_scaling else None
    zeros = _draw_zeros(config, rng, scale_dtype) if config.with_zeros else None
    bias = None
    if config.with_bias:
        spread = 4 if config.torch_out_dtype.is_floating_point else 40
        bias = torch.randn(config.N, generator=rng) * spread
        bias = bias.to(bias_dtype or config.torch_out_dtype)
    input_scale = _uniform(rng, (m,), 0.005, 0.02) if with_input_scale else None
    global_scale = _uniform(rng, (1,), 0.01, 0.05) if config.format.has_global_scale else None
    A, codes = _draw_A(config, m, rng).to(device), _draw_codes(config, rng).to(device)
    extras = (scale, zeros, bias, input_scale, global_scale)
    return Problem(config, A, codes, *(None if x is None else x.to(device) for x in extras))


def _uniform(rng: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
    return torch.rand(shape, generator=rng) * (high - low) + low


def _draw_A(config: MatmulConfig, m: int, rng: torch.Generator) -> torch.Tensor:
    shape = (config.K, m) if config.layout in ("tn", "tt") else (m, config.K)
    if config.A_dtype == "int8":
        return torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8)
    if config.A_dtype == "int4":
        return reference.pack_int4(torch.randint(-8, 8, shape, generator=rng, dtype=torch.int8))
    return torch.randn(shape, generator=rng).to(config.torch_A_dtype)


def _draw_codes(config: MatmulConfig, rng: torch.Generator) -> torch.Tensor:
    shape = (config.N, config.K)
    if config.is_dense:
        return torch.randn(shape, generator=rng).to(TORCH_DTYPES[config.W_dtype])
    values = config.format.code_values()
    if config.format.is_integer:
        usable = list(range(len(values)))
    else:
        usable = [code for code, v in enumerate(values) if abs(v) <= LARGEST_FLOAT_VALUE]
    picks = torch.randint(0, len(usable), shape, generator=rng)
    return torch.tensor(usable, dtype=torch.uint8)[picks]


def _draw_scale(
    config: MatmulConfig, rng: torch.Generator, dtype: torch.dtype | None
) -> torch.Tensor:
    shape = (config.N, config.num_groups)
    dtype = dtype or config.scale_dtypes[0]
    encoding = config.format.scale_encoding
    if encoding is None:
        return _uniform(rng, shape, 0.01, 0.1).to(dtype)
    if encoding == "e8m0":  # bytes: powers of two from 2^-7 to 2^-4
        scale = torch.randint(120, 124, shape, generator=rng, dtype=torch.uint8)
    else:
        scale = _uniform(rng, shape, 0.5, 4.0).to(torch.float8_e4m3fn).view(torch.uint8)
    return scale.view(dtype)


def _draw_zeros(
    config: MatmulConfig, rng: torch.Generator, dtype: torch.dtype | None
) -> torch.Tensor:
    if config.zeros_mode == "quantized":
        shape = (config.num_groups, config.N)
        codes = torch.randint(0, 1 << config.bits, shape, generator=rng, dtype=torch.int16)
        return pack_rows(codes.to(torch.uint8), config.bits)
    values = config.format.code_values()
    zeros = _uniform(rng, (config.N, config.num_groups), min(values), max(values))
    if config.zeros_mode == "rescale":
        zeros = zeros * 0.05
    return zeros.to(dtype or config.scale_dtypes[0])


def tolerance(config: MatmulConfig, *, with_input_scale: bool = False) -> float:
    """The largest relative Frobenius error that the specification allows against expected().

    Zero where the result must be exact: integer activations with nothing but integers beside them.
    """
    exact_zeros = not config.with_zeros or config.zeros_mode == "quantized"
    scaled = config.with_scaling or with_input_scale
    if config.A_dtype in INTEGER_ACTIVATIONS:
        if not config.torch_out_dtype.is_floating_point:
            # a scaled result next to a half may round either way: one unit in a few elements
            return 0.0 if exact_zeros and not scaled else 5e-3
        if config.out_dtype == "float32":
            return 1e-5
    if config.out_dtype == "float32" and config.A_dtype == "float32":
        return 1e-5
    return 4e-3 if config.out_dtype == "bfloat16" else 1e-3


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| over the finite part of ref; inf where NaN and infinities differ."""
    out, ref = out.to(torch.float64), ref.to(device=out.device, dtype=torch.float64)
    finite = ref.isfinite()
    special_out, special_ref = out[~finite], ref[~finite]
    if not torch.equal(special_out.isnan(), special_ref.isnan()):
        return math.inf
    if not torch.equal(special_out.nan_to_num(), special_ref.nan_to_num()):
        return math.inf
    difference = (out[finite] - ref[finite]).norm().item()
    norm = ref[finite].norm().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / norm if norm else (0.0 if difference == 0 else math.inf)

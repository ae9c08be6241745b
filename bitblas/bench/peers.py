"""Other libraries' products of the same quantised weight.

A peer's `prepare` packs the weight the library's own way, at a fresh place in memory, and returns
a function of A; it raises UnsupportedError, with the reason, for what the library has no kernel
for. Values are the same as ours: scales, zero points and tables are handed over, nothing is
quantised again.
Peers whose package is missing, or fails to import, are left out.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from importlib import metadata

import torch

from ..config import FP8_ACTIVATIONS, MatmulConfig
from ..formats import Affine, Table
from .cases import Weight

Product = Callable[[torch.Tensor], torch.Tensor]

# Times the tolerance that our own results must meet: peers round weights to 16 bits, add float16
# partial sums, or round zero points times scales. The error is in every row.
LEEWAY = 5.0


class UnsupportedError(Exception):
    """The library has no product for this format, shape or device."""


class Peer(ABC):
    """A library's matrix product. package: what must be installed for it, or None."""

    name: str
    package: str | None = None

    @abstractmethod
    def prepare(self, weight: Weight) -> Product:
        """A function (m, K) -> (m, N) on a packed copy of its own."""

    def missing(self) -> bool:
        """Whether the package is not installed."""
        return self.package is not None and importlib.util.find_spec(self.package) is None

    def version(self) -> str:
        """ "name version", of its package or of torch."""
        return f"{self.name} {metadata.version(self.package or 'torch')}"


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedError(reason)


def _affine(config: MatmulConfig) -> Affine:
    decoder = config.format.decoder
    if not isinstance(decoder, Affine):
        raise UnsupportedError("integer formats only")
    return decoder


def _shift(weight: Weight) -> torch.Tensor:
    """(N, G) float64 z such that a weight is (code - z) * scale * step."""
    config, affine = weight.config, _affine(weight.config)
    zeros = weight.extras.get("zeros")
    groups = (config.N, config.num_groups)
    point = (
        torch.zeros(groups, dtype=torch.float64, device=weight.codes.device)
        if zeros is None
        else zeros.to(torch.float64)
    )
    return (point - affine.offset) / affine.step


def _tinygemm_scales(weight: Weight) -> torch.Tensor:
    """(G, N, 2): tinygemm's weight is (code - 8) * scale + zero."""
    _require(weight.config.bits == 4, "4-bit integers only")
    shift, scale = _shift(weight), weight.extras["scale"]
    zero = ((8 - shift) * scale.to(torch.float64)).to(scale.dtype)
    return torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()


def _tinygemm_gpu_weight(weight: Weight) -> torch.Tensor:
    pairs = (weight.codes[:, ::2] << 4) | weight.codes[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)


def _require_tinygemm(config: MatmulConfig, device: torch.device, k_multiple: int) -> None:
    _require(config.with_scaling and config.bits == 4, "4-bit weights with scales only")
    _affine(config)
    _require(config.group_length in (32, 64, 128, 256), "groups of 32, 64, 128 or 256 only")
    # on a CPU other dtypes are taken too, by scalar code: 10 times as slow (Zen 3, m = 1)
    _require(config.A_dtype == "bfloat16", "bfloat16 activations only")
    if device.type == "cuda":
        _require(
            config.N % 8 == 0 and config.K % k_multiple == 0,
            f"N in multiples of 8 and K in multiples of {k_multiple} only",
        )
    else:
        _require(config.N % 16 == 0, "N in multiples of 16 only")


class TorchInt4(Peer):
    """torch's own 4-bit product (tinygemm on GPUs)."""

    name = "torch int4"

    def prepare(self, weight: Weight) -> Product:
        config, device = weight.config, weight.codes.device
        _require_tinygemm(config, device, 128)
        scales, group, ops = _tinygemm_scales(weight), config.group_length, torch.ops.aten
        if device.type == "cuda":
            packed = _tinygemm_gpu_weight(weight)
            return lambda A: ops._weight_int4pack_mm(A, packed, group, scales)
        packed = ops._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32), 1)
        return lambda A: ops._weight_int4pack_mm_for_cpu(A, packed, group, scales)


class TorchAO(Peer):
    """torchao's Int4TilePackedTo4dTensor, a weight for torch.nn.functional.linear."""

    name = package = "torchao"

    def prepare(self, weight: Weight) -> Product:
        config, device = weight.config, weight.codes.device
        _require(device.type == "cuda", "CUDA only")
        _require_tinygemm(config, device, 1024)
        from torchao.quantization import Int4TilePackedTo4dTensor

        quantised = Int4TilePackedTo4dTensor(
            _tinygemm_gpu_weight(weight),
            _tinygemm_scales(weight),
            [1, config.group_length],
            torch.Size((config.N, config.K)),
        )
        return lambda A: torch.nn.functional.linear(A, quantised)


class BitsAndBytes(Peer):
    """bitsandbytes.matmul_4bit of an nf4 weight (without its double quantisation of scales)."""

    name = package = "bitsandbytes"

    def prepare(self, weight: Weight) -> Product:
        config, device = weight.config, weight.codes.device
        decoder = config.format.decoder
        _require(isinstance(decoder, Table) and config.bits == 4, "nf4 only")
        _require(config.A_dtype in ("float16", "bfloat16", "float32"), "floating activations only")
        _require(config.with_scaling, "weights with scales only")
        sizes = (64, 128, 256, 512, 1024, 2048, 4096)
        _require(config.group_length in sizes, f"groups of {', '.join(map(str, sizes))} only")
        import bitsandbytes
        from bitsandbytes.functional import QuantState

        # the first of two values in the high half of a byte; scales ("absmax") in float32
        packed = ((weight.codes[:, ::2] << 4) | weight.codes[:, 1::2]).reshape(-1, 1)
        state = QuantState(
            absmax=weight.extras["scale"].float().flatten(),
            shape=torch.Size((config.N, config.K)),
            code=torch.tensor(config.format.code_values(), dtype=torch.float32, device=device),
            blocksize=config.group_length,
            quant_type="nf4",
            dtype=config.torch_A_dtype,
        )
        return lambda A: bitsandbytes.matmul_4bit(A, packed.t(), quant_state=state)


class GemLite(Peer):
    """gemlite's GemLiteLinearTriton, which tunes itself at the first call of every m."""

    name = package = "gemlite"

    def prepare(self, weight: Weight) -> Product:
        config = weight.config
        affine = _affine(config)
        _require(config.bits in (1, 2, 4, 8), "1, 2, 4 and 8 bits only")
        _require(config.A_dtype in ("float16", "bfloat16"), "16-bit activations only")
        _require(config.with_scaling, "weights with scales only")
        _require(config.group_length >= 32 and config.K % 128 == 0 and config.N % 128 == 0,
                 "groups of 32 and up, N and K in multiples of 128 only")  # fmt: skip
        from gemlite.core import DType, GemLiteLinearTriton

        dtype = DType.FP16 if config.A_dtype == "float16" else DType.BF16
        linear = GemLiteLinearTriton(
            config.bits,
            group_size=config.group_length,
            in_features=config.K,
            out_features=config.N,
            input_dtype=dtype,
            output_dtype=dtype,
        )
        # its weight is (W_q - zeros) * scales, W_q unsigned
        scale = weight.extras["scale"]
        linear.pack(
            weight.codes ^ affine.flip,
            scale * affine.step,
            _shift(weight).to(scale.dtype),
            None,
        )
        return lambda A: linear(A)


class TorchInt8(Peer):
    """torch._int_mm: int8 times int8, int32 results."""

    name = "torch._int_mm"

    def prepare(self, weight: Weight) -> Product:
        config = weight.config
        _require(config.A_dtype == config.W_dtype == "int8", "int8 times int8 only")
        _require(not config.with_scaling and not config.with_zeros, "without scales only")
        dense = weight.codes.view(torch.int8).clone()
        return lambda A: torch._int_mm(A, dense.T)


class TorchFP8(Peer):
    """torch._scaled_mm with one scale for each row of A and of W: fp8 times fp8."""

    name = "torch._scaled_mm"

    def prepare(self, weight: Weight) -> Product:
        config, device = weight.config, weight.codes.device
        fp8 = config.A_dtype in FP8_ACTIVATIONS and config.W_dtype in FP8_ACTIVATIONS
        _require(fp8 and "e4m3_float8" in (config.A_dtype, config.W_dtype), "fp8 with e4m3 only")
        _require(config.with_scaling and config.num_groups == 1, "one scale for a row only")
        _require(config.N % 16 == 0 and config.K % 16 == 0, "N and K in multiples of 16 only")
        dense = weight.codes.view(config.format.torch_dtype).clone()  # type: ignore[attr-defined]
        scale = weight.extras["scale"].float().T.contiguous()

        @cache
        def ones(m: int) -> torch.Tensor:
            return torch.ones((m, 1), device=device)

        return lambda A: torch._scaled_mm(
            A, dense.T, ones(A.shape[0]), scale, out_dtype=config.torch_out_dtype
        )


PEERS: tuple[Peer, ...] = (
    TorchInt4(), TorchInt8(), TorchFP8(), TorchAO(), BitsAndBytes(), GemLite(),
)  # fmt: skip

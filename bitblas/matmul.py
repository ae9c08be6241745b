"""Matmul: packing, the call, tuning and inspection."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from . import plan
from .config import STORAGE_DTYPES, MatmulConfig, MatmulConfigWithSplitK
from .formats import FORMATS
from .layouts import layout_of
from .operands import (
    check_extras,
    check_no_tangent,
    check_tensor,
    check_weight,
    dense_weight_shape,
    input_features,
    native_layout,
    packed_shape,
)
from .repeat import MOST_CALLS, kind_of, plain_eager, unknown
from .torch_ops import Optional, Prepared, dense_product, prepare
from .utils.target_detector import Target, resolve_target

BITBLAS_TRICK_DTYPE_MAP: dict[str, tuple[str, int]] = {
    name: (fmt.source_format, fmt.bits) for name, fmt in FORMATS.items()
}


class Operator:
    """Base of the public operators: a config, a name and a target."""

    def __init__(self, config: Any, name: str, target: str | None = None) -> None:
        self.config = config
        self.name = name
        self.target: Target = resolve_target(target)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def cleanup(self) -> None:
        """Nothing is left behind by an operator; kept for callers."""


class Matmul(Operator):
    """C = A · W^T for one MatmulConfig.

    target: None detects the GPU; "cpu" forces the CPU path; "cuda -arch=sm_90" and the like.
    enable_tuning, from_database, backend: accepted as in BitBLAS 0.1. Construction measures
    nothing; recorded choices are used wherever there are some, see hardware_aware_finetune.

    Raises ValueError for an unknown target or backend.
    """

    BITBLAS_TRICK_DTYPE_MAP = BITBLAS_TRICK_DTYPE_MAP
    input_transform = None

    def __init__(
        self,
        config: MatmulConfig,
        name: str = "matmul",
        target: str | None = None,
        enable_tuning: bool = True,
        from_database: bool = False,
        backend: Any = "tir",
    ) -> None:
        if not isinstance(config, MatmulConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a MatmulConfig")
        if str(getattr(backend, "value", backend)) not in ("tir", "tl", "tilelang"):
            raise ValueError(f"backend: got {backend!r}, expected 'tir' or 'tl'")
        super().__init__(config, name, target)
        self._key = config.key
        self._transposed_A = config.layout[0] == "t"
        self._repeats = self.target.is_gpu and not config.is_dense and not self._transposed_A
        self._calls: dict[Any, Prepared | None] = {}
        self._last: tuple[Any, Prepared] = (None, unknown)
        enabled = (config.with_scaling, config.with_zeros, config.with_bias)
        self._places = tuple(place for place, on in enumerate(enabled) if on)

    def __getattr__(self, field: str) -> Any:
        """Every field of the config reads as an attribute of the operator."""
        if field.startswith("_") or field == "config":
            raise AttributeError(field)
        try:
            return getattr(self.config, field)
        except AttributeError:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {field!r}"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles prepare their calls anew."""
        return {**self.__dict__, "_calls": {}, "_last": (None, unknown)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config}, target={str(self.target)!r})"

    # attributes that callers read

    @property
    def bit(self) -> int:
        return self.config.bits

    @property
    def source_format(self) -> str:
        return self.config.format.source_format

    @property
    def lut(self) -> torch.Tensor | None:
        """The table of a format that is one (nf4), in A_dtype; None for the others."""
        if self.source_format != "nf":
            return None
        return torch.tensor(self.config.format.code_values(), dtype=self.config.torch_A_dtype)

    @property
    def lib(self) -> Any:
        """The registered torch operator."""
        return torch.ops.bitblas.matmul

    @property
    def torch_func(self) -> Callable[..., torch.Tensor]:
        return self.forward

    @property
    def dynamic_range(self) -> dict[str, tuple[int, ...]] | None:
        return {"m": self.config.M} if isinstance(self.config.M, tuple) else None

    # packing

    def transform_weight(
        self,
        weight: torch.Tensor,
        scale: Optional = None,
        zeros: Optional = None,
        bias: Optional = None,
        global_scale: Optional = None,
    ) -> torch.Tensor:
        """Logical values -> the packed weight, on the same device.

        weight: (N, K), or (K, N) for layouts "nn" and "tn". Integers in any dtype for integer
        formats; codes for nf4 and fp4; an fp8 tensor or its bytes for fp8. Extras that are given
        are validated; only the packed weight is returned.

        Raises ValueError for a wrong shape or a value that the format cannot hold.
        """
        given = {"scale": scale, "zeros": zeros, "bias": bias, "global_scale": global_scale}
        check_tensor("weight", weight)
        if any(x is not None for x in given.values()):
            check_extras(self.config, weight.device, **given, partial=True)
        if self.config.is_dense:
            return self.weight_codes(weight).contiguous()
        return self._pack(self.weight_codes(weight))

    def weight_codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Logical values, as transform_weight takes them -> uint8 codes (N, K) (dense: values)."""
        check_tensor("weight", weight)
        expected = dense_weight_shape(self.config)
        if tuple(weight.shape) != expected:
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected {expected}")
        codes = self.config.format.to_codes(weight)
        return codes if self.config.is_dense or self.config.layout[1] == "t" else codes.T

    def _pack(self, codes: torch.Tensor) -> torch.Tensor:
        layout = native_layout(self.config, "cuda" if self.target.is_gpu else "cpu")
        packed = layout.pack(codes.contiguous(), self.config.bits)
        packed_shape(self.config, layout)  # raises where the storage dtype does not fit
        return packed.view(STORAGE_DTYPES[self.config.storage_dtype])

    @property
    def weight_transform(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """A function from codes (N, K), int8 or uint8, to the packed weight; None if dense."""
        return None if self.config.is_dense else self._transform_codes

    def _transform_codes(self, codes: torch.Tensor) -> torch.Tensor:
        check_tensor("weight", codes)
        if tuple(codes.shape) != (self.config.N, self.config.K):
            raise ValueError(
                f"weight: got codes of shape {tuple(codes.shape)}, expected "
                f"{(self.config.N, self.config.K)}"
            )
        return self._pack(self.config.format.check_codes(codes))

    def retrieve_weight_shape(self) -> list[int]:
        """The shape of the tensor that transform_weight returns."""
        if self.config.is_dense:
            return list(dense_weight_shape(self.config))
        layout = native_layout(self.config, "cuda" if self.target.is_gpu else "cpu")
        return list(packed_shape(self.config, layout))

    def inverse_transform_weight(self, packed: torch.Tensor) -> torch.Tensor:
        """The codes (N, K), as int8, of a packed weight; a dense weight comes back as it is."""
        check_tensor("W", packed)
        check_weight(self.config, packed)
        if self.config.is_dense:
            return packed
        data, config = packed.contiguous().view(torch.int8), self.config
        return layout_of(data).unpack(data, config.bits, config.N, config.K).view(torch.int8)

    def transform_input(self, A: torch.Tensor) -> torch.Tensor:
        """Activations need no transform."""
        return A

    # the call

    def _bind(self, extras: tuple[Any, ...], named: list[Any]) -> list[Any]:
        """Positional extras into (scale, zeros, bias, output): by enabled feature, or by the
        signature with its Nones."""
        places = self._places
        if len(extras) > len(places) or any([x is None for x in extras]):
            places = (0, 1, 2, 3)
        if len(extras) > len(places):
            raise TypeError(
                f"got {len(extras)} operands after W, expected at most scale, zeros, bias, output"
            )
        for place, value in zip(places, extras):
            if named[place] is not None:
                name = ("scale", "zeros", "bias", "output")[place]
                raise TypeError(f"{name}: given twice, by position and by name")
            named[place] = value
        return named

    def forward(
        self,
        A: torch.Tensor,
        W: torch.Tensor,
        *extras: Optional,
        scale: Optional = None,
        zeros: Optional = None,
        bias: Optional = None,
        output: Optional = None,
        input_scale: Optional = None,
        global_scale: Optional = None,
    ) -> torch.Tensor:
        """The product, of shape (..., N) and out_dtype, on A's device and current stream.

        A: (..., K) in A_dtype (int4: (..., K/2) int8); (..., K, M) for layouts "tn" and "tt".
        W: what transform_weight returned.
        Positional operands after W bind, in the order scale, zeros, bias, to the features that the
        config enables. scale: (N, G); zeros: (N, G), or packed (G, N*b/8) in mode "quantized";
        bias: (N,). input_scale: float32, one for each row of 8-bit A. global_scale: one float32
        (nvfp4). output: written and returned.

        Raises ValueError or TypeError that names the operand, what came and what was expected.
        """
        if extras:
            scale, zeros, bias, output = self._bind(extras, [scale, zeros, bias, output])
        kind = None
        if self._repeats and output is None and plain_eager():
            operands = (A, W, scale, zeros, bias, input_scale, global_scale)
            kind = kind_of(operands)
            last = self._last  # read once: other threads replace it
            if kind == last[0]:
                call: Prepared | None = last[1]
            else:
                call = self._calls.get(kind, unknown)
                if call is not None:
                    self._last = (kind, call)
            product = None if call is None else call(operands)
            if product is not None:
                return product
            if call is None:
                kind = None
        product = self._checked(A, W, scale, zeros, bias, output, input_scale, global_scale)
        if kind is not None:
            if len(self._calls) >= MOST_CALLS:
                self._calls.clear()
            self._calls[kind] = prepare(self.config, operands)
            self._last = (None, unknown)
        return product

    def _checked(
        self,
        A: torch.Tensor,
        W: torch.Tensor,
        scale: Optional,
        zeros: Optional,
        bias: Optional,
        output: Optional,
        input_scale: Optional,
        global_scale: Optional,
    ) -> torch.Tensor:
        """The product through the registered operator, whatever the operands are."""
        check_tensor("A", A)
        check_tensor("W", W)
        for name, x in (
            ("scale", scale),
            ("zeros", zeros),
            ("bias", bias),
            ("output", output),
            ("input_scale", input_scale),
            ("global_scale", global_scale),
        ):
            if x is not None:
                check_tensor(name, x)
        if self._transposed_A:
            if A.dim() < 2:
                raise ValueError(
                    f"A: got shape {tuple(A.shape)}, expected (..., {self.config.K}, M)"
                )
            A = A.transpose(-1, -2)
        operands = (A, W, scale, zeros, bias, input_scale, global_scale, self._key)
        if output is None:
            needs_grad = A.requires_grad or (bias is not None and bias.requires_grad)
            if needs_grad or torch.compiler.is_compiling():
                return torch.ops.bitblas.matmul(*operands)
            check_no_tangent("A", A)
            # past the autograd formula: 13 of the 85 us of a small call on a Zen 3
            with torch._C._AutoDispatchBelowAutograd():
                return torch.ops.bitblas.matmul(*operands)
        for name, x in (("an A", A), ("a bias", bias)):
            if x is not None and x.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"output: not with {name} that requires grad; the gradient would be lost"
                )
        torch.ops.bitblas.matmul_out(*operands, output)
        return output

    # tuning and inspection

    def hardware_aware_finetune(
        self, topk: int = 20, target: str | None = None, parallel_build: bool = True
    ) -> None:
        """Measure the best `topk` kernel choices for every M of the config and record the winners.

        The record is used at once and, with cache.save_into_database, in later processes. On the
        CPU, and for dense pairs, there is one choice and nothing to measure.
        """
        if topk < 1:
            raise ValueError(f"topk: got {topk}, expected a positive integer")
        if target is not None:
            self.target = resolve_target(target)
        if self.target.is_gpu and not self.config.is_dense:
            for m in hinted_rows(self.config):
                plan.tune(self.config, m, topk, self.random_call(m))

    def random_call(self, m: int) -> Callable[[], torch.Tensor]:
        """A call on random operands of m rows, ready to be repeated."""
        config, device = self.config, torch.device("cuda" if self.target.is_gpu else "cpu")

        def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            size = torch.Size(shape).numel() * dtype.itemsize
            if dtype.is_floating_point and dtype.itemsize > 1:
                return torch.rand(shape, device=device).to(dtype)
            # small positive patterns: no NaN in any 8-bit format
            return (
                torch.randint(0, 64, (size,), dtype=torch.uint8, device=device)
                .view(dtype)
                .view(shape)
            )

        A = random((m, input_features(config)), config.torch_A_dtype)
        if config.is_dense:
            W = random(dense_weight_shape(config), config.format.torch_dtype)
        else:
            W = random(tuple(self.retrieve_weight_shape()), STORAGE_DTYPES[config.storage_dtype])
        extras = {
            "scale": random((config.N, config.num_groups), config.scale_dtypes[0])
            if config.with_scaling
            else None,
            "zeros": random(config.zeros_shape, config.zeros_dtypes[0])
            if config.with_zeros
            else None,
            "bias": random((config.N,), config.torch_out_dtype) if config.with_bias else None,
            "global_scale": random((1,), torch.float32) if config.format.has_global_scale else None,
        }
        if self._transposed_A:
            A = A.T
        return lambda: self.forward(A, W, **extras)

    def profile_latency(self, dynamic_symbolic_constraints: dict[str, int] | None = None) -> float:
        """Milliseconds of one call on random operands (median; on a GPU, with the weight in cache).

        dynamic_symbolic_constraints: {"m": rows}; by default the largest M of the config.
        """
        m = (dynamic_symbolic_constraints or {}).get("m") or max(hinted_rows(self.config))
        if m < 1:
            raise ValueError(f"m: got {m}, expected a positive number of rows")
        call = self.random_call(m)
        if self.target.is_gpu:
            return plan.gpu_milliseconds(call)
        call()
        times = []
        for _ in range(10):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)

    def get_source(
        self, target: str | None = None, kenrel_only: bool = False, kernel_only: bool = False
    ) -> str:
        """The Python source of the kernels that serve this operator."""
        if self.config.is_dense:
            return inspect.getsource(dense_product)
        is_gpu = (self.target if target is None else resolve_target(target)).is_gpu
        return plan.kernel_source("cuda" if is_gpu else "cpu")


def hinted_rows(config: MatmulConfig) -> tuple[int, ...]:
    """The numbers of rows that a config expects."""
    return config.M if isinstance(config.M, tuple) else (config.M or 1,)


class MatmulWithSplitK(Matmul):
    """Matmul with its reduction over K split into k_split parts."""

    def __init__(self, config: MatmulConfigWithSplitK, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, MatmulConfigWithSplitK):
            raise TypeError(
                f"config: got {type(config).__name__}, expected a MatmulConfigWithSplitK"
            )
        super().__init__(config, *args, **kwargs)

"""The border: what a call's tensors must look like. Everything behind it trusts its inputs."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from .config import (
    FLOAT_ACTIVATIONS,
    QUANTIZED_ACTIVATIONS,
    STORAGE_DTYPES,
    TORCH_DTYPES,
    MatmulConfig,
)
from .layouts import FRAGMENTS, ROW16, Fragment, Layout, layout_of


def native_layout(config: MatmulConfig, device_type: str) -> Layout:
    """The packed layout that the backend of a device reads."""
    return ROW16 if device_type == "cpu" else FRAGMENTS[config.element_bits]


def dense_weight_shape(config: MatmulConfig) -> tuple[int, int]:
    """A dense weight stays as the layout says: (N, K), or (K, N) for "nn" and "tn"."""
    return (config.N, config.K) if config.layout[1] == "t" else (config.K, config.N)


def input_features(config: MatmulConfig) -> int:
    """Elements of A's tensor along K: int4 holds two values in each."""
    return config.K // 2 if config.A_dtype == "int4" else config.K


def check_weight(config: MatmulConfig, W: torch.Tensor) -> None:
    """Raise unless the tensor W is the packed weight (dense: the weight) of `config`."""
    if config.is_dense:
        _check("W", W, dense_weight_shape(config), (config.format.torch_dtype,))  # type: ignore[attr-defined]
        return
    storage = STORAGE_DTYPES[config.storage_dtype]
    if W.dtype != storage:
        raise TypeError(
            f"W: got {W.dtype}, expected a packed weight of {storage}; pack with transform_weight"
        )
    layout = layout_of(W)
    if isinstance(layout, Fragment) and layout is not native_layout(config, "cuda"):
        raise ValueError(
            f"W: packed for {layout.element_bits}-bit activations, but A_dtype is "
            f"{config.A_dtype!r}; "
            f"pack with this operator's transform_weight"
        )
    expected = packed_shape(config, layout)
    if tuple(W.shape) != expected:
        raise ValueError(
            f"W: got shape {tuple(W.shape)}, expected {expected} for the {layout.name} layout of "
            f"{config.W_dtype}, N={config.N}, K={config.K}; pack with this operator's "
            "transform_weight"
        )


def packed_shape(config: MatmulConfig, layout: Layout) -> tuple[int, ...]:
    """The shape of a packed weight in elements of the storage dtype."""
    *outer, last = layout.shape(config.bits, config.N, config.K)
    itemsize = STORAGE_DTYPES[config.storage_dtype].itemsize
    if last % itemsize:
        raise ValueError(
            f"storage_dtype: rows of {last} bytes cannot be viewed as {config.storage_dtype}; "
            "use int8"
        )
    return (*outer, last // itemsize)


def check_extras(
    config: MatmulConfig,
    device: torch.device,
    scale: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    partial: bool = False,
) -> None:
    """Raise unless the extras are those that the config enables, in shape, dtype and device.

    partial: an extra that is missing is no error.
    """
    shape = (config.N, config.num_groups)
    _extra("scale", scale, config.with_scaling, shape, config.scale_dtypes, device, partial)
    _extra(
        "zeros", zeros, config.with_zeros, config.zeros_shape, config.zeros_dtypes, device, partial
    )
    bias_dtypes = (config.torch_out_dtype, config.torch_A_dtype)
    _extra("bias", bias, config.with_bias, (config.N,), bias_dtypes, device, partial)
    if global_scale is not None:
        if not config.format.has_global_scale:
            raise ValueError(
                f"global_scale: got a tensor, but {config.W_dtype} has no per-tensor scale"
            )
        check_tensor("global_scale", global_scale)
        if global_scale.numel() != 1 or global_scale.dtype != torch.float32:
            raise ValueError(
                f"global_scale: got shape {tuple(global_scale.shape)} {global_scale.dtype}, "
                f"expected one float32"
            )
        _same_device("global_scale", global_scale, device)
    elif config.format.has_global_scale and not partial:
        raise ValueError(f"global_scale: missing, {config.W_dtype} needs one float32 tensor")


def check_call(
    config: MatmulConfig,
    A: torch.Tensor,
    W: torch.Tensor,
    scale: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> None:
    """Raise ValueError or TypeError unless the tensors fit the config. A is (..., K) here."""
    if A.dtype != config.torch_A_dtype:
        raise TypeError(
            f"A: got {A.dtype}, expected {config.torch_A_dtype} for A_dtype {config.A_dtype!r}"
        )
    features = input_features(config)
    if A.dim() < 1 or A.shape[-1] != features:
        packed = " (two int4 values in a byte)" if config.A_dtype == "int4" else ""
        raise ValueError(
            f"A: got shape {tuple(A.shape)}, expected (..., {features}){packed} for K={config.K}"
        )
    check_weight(config, W)
    _same_device("W", W, A.device)
    check_extras(config, A.device, scale, zeros, bias, global_scale)
    if input_scale is not None:
        if A.dtype.itemsize != 1:
            raise ValueError(
                f"input_scale: goes with 8-bit activations only, A_dtype is {config.A_dtype!r}"
            )
        rows = A.numel() // features
        if input_scale.numel() != rows or input_scale.dtype != torch.float32:
            raise ValueError(
                f"input_scale: got shape {tuple(input_scale.shape)} {input_scale.dtype}, expected "
                f"{rows} float32 values, one for each row of A"
            )
        _same_device("input_scale", input_scale, A.device)


def check_output(
    config: MatmulConfig, out: torch.Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise unless `output=` can hold the product."""
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"output: got shape {tuple(out.shape)}, expected {tuple(shape)}")
    if out.dtype != config.torch_out_dtype:
        raise TypeError(f"output: got {out.dtype}, expected {config.torch_out_dtype}")
    if out.device != device:
        raise ValueError(f"output: is on {out.device}, expected {device}, where A is")
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride())):
        raise ValueError(
            f"output: got strides {out.stride()} for shape {tuple(out.shape)}, expected a tensor "
            f"whose elements do not share memory"
        )


_FLOATS = tuple(TORCH_DTYPES[name] for name in FLOAT_ACTIVATIONS)


def check_unquantized(x: torch.Tensor, dtype: str) -> None:
    """Raise unless the rows of x can be quantised to `dtype`."""
    if dtype not in QUANTIZED_ACTIVATIONS:
        valid = " or ".join(QUANTIZED_ACTIVATIONS)
        raise ValueError(f"dtype: got {dtype!r}, expected {valid}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x: got {x.dtype}, expected one of {', '.join(FLOAT_ACTIVATIONS)}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected rows of at least one value")


def check_no_tangent(name: str, x: torch.Tensor) -> None:
    """Raise ValueError where forward-mode differentiation would lose a tangent."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(f"{name}: carries a tangent; only reverse-mode gradients are there")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a dense tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: got a {kind} tensor, expected a strided one")


def _same_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, expected {device}, where A is")


def _check(
    name: str, x: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {shape}")
    if x.dtype not in dtypes:
        valid = " or ".join(str(d) for d in dict.fromkeys(dtypes))
        raise TypeError(f"{name}: got {x.dtype}, expected {valid}")


def _extra(
    name: str,
    x: torch.Tensor | None,
    enabled: bool,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    partial: bool,
) -> None:
    flag = {"scale": "with_scaling", "zeros": "with_zeros", "bias": "with_bias"}[name]
    if x is None:
        if enabled and not partial:
            raise ValueError(f"{name}: missing, the config has {flag}=True; expected shape {shape}")
        return
    if not enabled:
        raise ValueError(f"{name}: got a tensor, but the config has {flag}=False")
    check_tensor(name, x)
    _check(name, x, shape, dtypes)
    _same_device(name, x, device)

"""The registered torch operators: bitblas::matmul, matmul_out, quantized_matmul, dequantize and
quantize_activation.

They are what torch.compile, CUDA graphs and autograd see; a call checks its operands here, whoever
makes it, and carries the config as a string.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .config import FLOAT_ACTIVATIONS, TORCH_DTYPES, MatmulConfig
from .layouts import aligned, convert, layout_of
from .log import logger
from .operands import check_call, check_output, check_unquantized, check_weight, native_layout

Optional = torch.Tensor | None
Prepared = Callable[[tuple[Optional, ...]], Optional]
Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]

_EXTRAS = "Tensor? scale, Tensor? zeros, Tensor? bias, Tensor? input_scale, Tensor? global_scale"
_library = torch.library.Library("bitblas", "DEF")
_library.define(f"matmul(Tensor A, Tensor W, {_EXTRAS}, str config) -> Tensor")
_library.define(f"matmul_out(Tensor A, Tensor W, {_EXTRAS}, str config, Tensor(a!) out) -> ()")
_library.define(
    "quantized_matmul(Tensor x, Tensor W, Tensor? scale, Tensor? zeros, Tensor? bias, "
    "Tensor? global_scale, str config) -> Tensor"
)
_library.define(
    "dequantize(Tensor W, Tensor? scale, Tensor? zeros, Tensor? global_scale, str config, "
    "ScalarType? dtype=None) -> Tensor"
)
_library.define("quantize_activation(Tensor x, str dtype) -> (Tensor, Tensor)")


@cache
def _backend(device_type: str) -> ModuleType:
    """The module whose `matmul`, `dequantize` and `quantize_activation` serve a device; imported
    when first needed."""
    if device_type == "cpu":
        from . import cpu

        return cpu
    from .kernels import gpu

    return gpu


def prepare(config: MatmulConfig, operands: tuple[Optional, ...]) -> Prepared | None:
    """The call to repeat for operands like these, which have passed the checks: A, W, scale, zeros,
    bias, input_scale, global_scale. It takes them and returns the product (None: not this way).

    None where every call is to go through the registered operator.
    """
    A = operands[0]
    if A is None or A.device.type != "cuda":
        return None
    prepared: Prepared | None = _backend("cuda").prepare(config, operands)
    return prepared


def prepare_quantizer(x: torch.Tensor, dtype: str) -> Quantizer | None:
    """The call to repeat for tensors like x, which has passed the checks (None: not this way)."""
    if x.device.type != "cuda":
        return None
    quantizer: Quantizer | None = _backend("cuda").prepare_quantizer(x, dtype)
    return quantizer


def _share_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether the address ranges of two tensors meet: then one cannot be written in parts."""

    def end(t: torch.Tensor) -> int:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
        return t.data_ptr() + (last + 1) * t.itemsize

    return x.data_ptr() < end(y) and y.data_ptr() < end(x)


def _contiguous(x: Optional) -> Optional:
    return None if x is None else x.contiguous()


@cache
def _warn_of_conversion(source: str, target: str) -> None:
    """Once in a process: the calls work, but each one repacks the weight."""
    logger.warning(
        "W is in the %s layout and is converted to %s on every call; pack it for the device it is "
        "used on",
        source,
        target,
    )


def _native_weight(config: MatmulConfig, W: torch.Tensor) -> torch.Tensor:
    """W as int8 words in the layout that its device's backend reads."""
    W = aligned(W)
    if W.dtype != torch.int8:
        W = W.view(torch.int8)
    layout = native_layout(config, W.device.type)
    if layout_of(W) is not layout:
        _warn_of_conversion(layout_of(W).name, layout.name)
        W = convert(W, config.bits, config.N, config.K, layout)
    return W


def _dense_weight(config: MatmulConfig, W: torch.Tensor, scale: Optional) -> torch.Tensor:
    """The dense weight as (N, K), scaled in float32 where it has scales."""
    if config.layout[1] == "n":
        W = W.T
    if scale is not None:
        W = W.float() * scale.float().repeat_interleave(config.group_length, dim=1)
    return W


def dense_product(
    config: MatmulConfig, A: torch.Tensor, W: torch.Tensor, scale: Optional, bias: Optional
) -> torch.Tensor:
    """torch's own product, in the operands' common dtype."""
    W, out_dtype = _dense_weight(config, W, scale), config.torch_out_dtype
    if A.dtype != W.dtype or A.dtype != out_dtype:
        A, W = A.float(), W.float()  # no rounding to A's dtype, or overflow in it, on the way
    product = torch.matmul(A, W.T)
    if bias is not None:
        product = product + bias
    return product.to(out_dtype)


def _rows(
    A: torch.Tensor, W: torch.Tensor, extras: tuple[Optional, ...], key: str, out: Optional
) -> torch.Tensor:
    """The product of checked operands, into `out` or a new tensor."""
    config = MatmulConfig.from_key(key)
    check_call(config, A, W, *extras)
    shape = (*A.shape[:-1], config.N)
    if out is not None:
        check_output(config, out, shape, A.device)
    scale, zeros, bias, input_scale, global_scale = extras
    if config.is_dense:
        product = dense_product(config, A, W, scale, bias)
        return product if out is None else out.copy_(product)
    into = (
        out
        if out is not None and out.is_contiguous() and not _share_memory(out, A)
        else A.new_empty(shape, dtype=config.torch_out_dtype)
    )
    rows = A.reshape(-1, A.shape[-1]).contiguous()
    if rows.shape[0]:
        backend = _backend(A.device.type)
        backend.matmul(
            config,
            rows,
            _native_weight(config, W),
            into.view(-1, config.N),
            scale=_contiguous(scale),
            zeros=_contiguous(zeros),
            bias=_contiguous(bias),
            input_scale=None if input_scale is None else input_scale.reshape(-1).contiguous(),
            global_scale=global_scale,
        )
    if out is not None and into is not out:
        out.copy_(into)
    return into


def _matmul(
    A: torch.Tensor,
    W: torch.Tensor,
    scale: Optional,
    zeros: Optional,
    bias: Optional,
    input_scale: Optional,
    global_scale: Optional,
    config: str,
) -> torch.Tensor:
    return _rows(A, W, (scale, zeros, bias, input_scale, global_scale), config, None)


def _matmul_out(
    A: torch.Tensor,
    W: torch.Tensor,
    scale: Optional,
    zeros: Optional,
    bias: Optional,
    input_scale: Optional,
    global_scale: Optional,
    config: str,
    out: torch.Tensor,
) -> None:
    _rows(A, W, (scale, zeros, bias, input_scale, global_scale), config, out)


def quantize_rows(x: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of x (..., K): q of x's shape in `dtype`, scale (...) float32.

    With g the greatest magnitude of a row (at least 2^-100), L the greatest number of `dtype`, in
    float32 arithmetic: scale = g / L, q = x * (1 / scale), rounded half to even. A row with a NaN
    or an infinity has the scale NaN and the q 0, so that its products are NaN.
    """
    check_unquantized(x, dtype)
    q = torch.empty(x.shape, dtype=TORCH_DTYPES[dtype], device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if q.numel():
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        backend = _backend(x.device.type)
        backend.quantize_activation(rows, q.view(rows.shape), scale.view(-1), dtype)
    return q, scale


def _quantized_matmul(
    x: torch.Tensor,
    W: torch.Tensor,
    scale: Optional,
    zeros: Optional,
    bias: Optional,
    global_scale: Optional,
    config: str,
) -> torch.Tensor:
    """The product of x quantised row by row to A_dtype."""
    A, input_scale = quantize_rows(x, MatmulConfig.from_key(config).A_dtype)
    return _rows(A, W, (scale, zeros, bias, input_scale, global_scale), config, None)


def _dequantize(
    W: torch.Tensor,
    scale: Optional,
    zeros: Optional,
    global_scale: Optional,
    config: str,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The weight (N, K) in a floating dtype; None is A_dtype."""
    cfg = MatmulConfig.from_key(config)
    dtype = dtype or cfg.torch_A_dtype
    if dtype not in [TORCH_DTYPES[name] for name in FLOAT_ACTIVATIONS]:
        raise ValueError(
            f"dtype: got {dtype}, dequantize gives one of {', '.join(FLOAT_ACTIVATIONS)}"
        )
    check_weight(cfg, W)
    if cfg.is_dense:
        return _dense_weight(cfg, W, scale).to(dtype, copy=True)
    out = torch.empty((cfg.N, cfg.K), dtype=dtype, device=W.device)
    _backend(W.device.type).dequantize(
        cfg,
        _native_weight(cfg, W),
        out,
        scale=_contiguous(scale),
        zeros=_contiguous(zeros),
        global_scale=global_scale,
    )
    return out


for _key in ("CPU", "CUDA"):
    _library.impl("matmul", _matmul, _key)
    _library.impl("matmul_out", _matmul_out, _key)
    _library.impl("quantized_matmul", _quantized_matmul, _key)
    _library.impl("dequantize", _dequantize, _key)
    _library.impl("quantize_activation", quantize_rows, _key)


@torch.library.register_fake("bitblas::matmul", lib=_library)
def _(A, W, scale, zeros, bias, input_scale, global_scale, config):  # type: ignore[no-untyped-def]
    cfg = MatmulConfig.from_key(config)
    check_call(cfg, A, W, scale, zeros, bias, input_scale, global_scale)
    return A.new_empty((*A.shape[:-1], cfg.N), dtype=cfg.torch_out_dtype)


@torch.library.register_fake("bitblas::matmul_out", lib=_library)
def _(A, W, scale, zeros, bias, input_scale, global_scale, config, out):  # type: ignore[no-untyped-def]
    cfg = MatmulConfig.from_key(config)
    check_call(cfg, A, W, scale, zeros, bias, input_scale, global_scale)
    check_output(cfg, out, (*A.shape[:-1], cfg.N), A.device)


@torch.library.register_fake("bitblas::quantized_matmul", lib=_library)
def _(x, W, scale, zeros, bias, global_scale, config):  # type: ignore[no-untyped-def]
    cfg = MatmulConfig.from_key(config)
    check_unquantized(x, cfg.A_dtype)
    check_call(
        cfg,
        x.new_empty(x.shape, dtype=cfg.torch_A_dtype),
        W,
        scale,
        zeros,
        bias,
        None,
        global_scale,
    )
    return x.new_empty((*x.shape[:-1], cfg.N), dtype=cfg.torch_out_dtype)


@torch.library.register_fake("bitblas::dequantize", lib=_library)
def _(W, scale, zeros, global_scale, config, dtype=None):  # type: ignore[no-untyped-def]
    cfg = MatmulConfig.from_key(config)
    return W.new_empty((cfg.N, cfg.K), dtype=dtype or cfg.torch_A_dtype)


@torch.library.register_fake("bitblas::quantize_activation", lib=_library)
def _(x, dtype):  # type: ignore[no-untyped-def]
    check_unquantized(x, dtype)
    q = x.new_empty(x.shape, dtype=TORCH_DTYPES[dtype])
    return q, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    A, W, scale, zeros, bias, *_, global_scale, ctx.config = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.dtype = A.dtype if A.dtype.is_floating_point and A.itemsize > 1 else None
    ctx.save_for_backward(W, scale, zeros, global_scale)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Optional, Optional]:
    """Of A and bias; weights are frozen, and rounding A to 8 bits counts as leaving it alone."""
    W, scale, zeros, global_scale = ctx.saved_tensors
    grad_A = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.bitblas.dequantize(W, scale, zeros, global_scale, ctx.config, ctx.dtype)
        grad_A = grad.to(weight.dtype) @ weight
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(dim=tuple(range(grad.dim() - 1))).to(ctx.bias_dtype)
    return grad_A, grad_bias


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional, ...]:
    grad_A, grad_bias = _gradients(ctx, grad)
    return grad_A, None, None, None, grad_bias, None, None, None


def _quantized_backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional, ...]:
    grad_x, grad_bias = _gradients(ctx, grad)
    return grad_x, None, None, None, grad_bias, None, None


for _name, _formula in (("matmul", _backward), ("quantized_matmul", _quantized_backward)):
    torch.library.register_autograd(
        f"bitblas::{_name}", _formula, setup_context=_save_for_backward, lib=_library
    )

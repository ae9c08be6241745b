"""Linear: a module whose weight is packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .cache import get_database_path
from .config import FLOAT_ACTIVATIONS, QUANTIZED_ACTIVATIONS, TORCH_DTYPES, MatmulConfig
from .formats import get_format
from .gptq import GPTQOperands, read_gptq, unpack_qzeros, unpack_qzeros_v2
from .layouts import (
    PLAIN,
    convert,
)
from .matmul import Matmul
from .operands import check_extras, dense_weight_shape, native_layout
from .quantization import quantize_activation as quantize_rows
from .quantization import quantize_weight

BITBLAS_DATABASE_PATH = get_database_path()

_FETCHED = ("qweight", "weight", "perm", "scales", "zeros", "bias", "global_scale")
_fetch = itemgetter(*_FETCHED)  # of a Linear's buffers


class Linear(nn.Module):
    """y = x · W^T + bias with a packed weight, frozen; the gradient of x is there for adapters.

    x: (..., in_features) in A_dtype -> (..., out_features) in out_dtype. opt_M and enable_tuning
    are hints; fast_decoding and propagate_b are accepted as in BitBLAS 0.1. with_scaling None is
    False, zeros_mode None is "original". See MatmulConfig for the rest and for the errors raised.

    quantize_activation: x is float16, bfloat16 or float32 instead and each of its rows is rounded
    to A_dtype, "int8" or "e4m3_float8", with a scale of its own (bitblas.quantize_activation). The
    gradient of x is then that of the product with x as it came (straight-through), and a cast of
    the module changes out_dtype, which must be one of those three too.

    Buffers: qweight (packed for the device it is on; plain rows in a state_dict), scales, zeros,
    bias as far as the config has them; global_scale for nvfp4; perm after an act-order repack;
    weight_format, which says what a checkpoint's bytes mean; weight alone for a dense pair.
    """

    qweight: torch.Tensor
    weight: torch.Tensor
    weight_format: torch.Tensor
    perm: torch.Tensor | None
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    global_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        A_dtype: str = "float16",
        W_dtype: str = "float16",
        accum_dtype: str = "float16",
        out_dtype: str = "float16",
        group_size: int = -1,
        with_scaling: bool | None = None,
        with_zeros: bool = False,
        zeros_mode: str | None = None,
        opt_M: int | Sequence[int] | None = (1, 16, 32, 64, 128, 256, 512),
        enable_tuning: bool = True,
        fast_decoding: bool | None = None,
        propagate_b: bool = False,
        quantize_activation: bool = False,
    ) -> None:
        super().__init__()
        config = MatmulConfig(
            M=opt_M if opt_M is None or isinstance(opt_M, int) else tuple(opt_M),
            N=out_features,
            K=in_features,
            A_dtype=A_dtype,
            W_dtype=W_dtype,
            out_dtype=out_dtype,
            accum_dtype=accum_dtype,
            with_bias=bias,
            group_size=group_size,
            with_scaling=with_scaling,  # type: ignore[arg-type]  # None is False
            with_zeros=with_zeros,
            zeros_mode=zeros_mode,  # type: ignore[arg-type]  # None is "original"
            fast_decoding=fast_decoding,
            propagate_b=propagate_b,
        )
        self.enable_tuning = enable_tuning
        self.quantize_activation = _checked_switch(quantize_activation, config)
        self._set_config(config)
        self._register_buffers()

    def _set_config(self, config: MatmulConfig) -> None:
        self.bitblas_matmul = Matmul(config, enable_tuning=self.enable_tuning)

    def _register_buffers(self) -> None:
        config = self.config
        if config.is_dense:
            dtype = TORCH_DTYPES[config.W_dtype]
            self.register_buffer("weight", torch.zeros(dense_weight_shape(config), dtype=dtype))
            self.register_buffer("qweight", None)
            self.register_buffer("weight_format", None)
        else:
            self.register_buffer("weight", None)
            device = torch.empty(0).device  # the default device, whatever context set it
            shape = native_layout(config, device.type).shape(config.bits, config.N, config.K)
            self.register_buffer("qweight", torch.zeros(shape, dtype=torch.int8))
            self.register_buffer("weight_format", checkpoint.format_tag(config))
        self.register_buffer("perm", None)
        # encoded scales are kept as bytes: safetensors reads no e8m0, pickle no 8-bit float
        encoded = config.format.scale_encoding is not None
        dtype = torch.uint8 if encoded else config.scale_dtypes[0]
        scale = torch.zeros((config.N, config.num_groups), dtype=dtype)
        self.register_buffer("scales", scale if config.with_scaling else None)
        zeros = torch.zeros(config.zeros_shape, dtype=config.zeros_dtypes[0])
        self.register_buffer("zeros", zeros if config.with_zeros else None)
        self.register_buffer(
            "global_scale",
            torch.ones(1, dtype=torch.float32) if config.format.has_global_scale else None,
        )
        bias = torch.zeros(config.N, dtype=config.torch_out_dtype)
        self.register_buffer("bias", bias if config.with_bias else None)

    # what callers read

    @property
    def config(self) -> MatmulConfig:
        return self.bitblas_matmul.config

    @property
    def in_features(self) -> int:
        return self.config.K

    @property
    def out_features(self) -> int:
        return self.config.N

    @property
    def opt_M(self) -> int | tuple[int, ...] | None:
        return self.config.M

    @property
    def group_size(self) -> int:
        """Values of k in a group: in_features where there is one group."""
        return self.config.group_length

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.config.torch_A_dtype

    @property
    def bits(self) -> int:
        return self.config.bits

    @property
    def source_format(self) -> str:
        return self.config.format.source_format

    @property
    def zeros_mode(self) -> str:
        return self.config.zeros_mode

    @property
    def consistent(self) -> bool:
        """Whether W is of A's dtype and so needs no decoding."""
        return self.config.A_dtype == self.config.W_dtype

    is_consitent = consistent  # the historical spelling

    def extra_repr(self) -> str:
        config = self.config
        text = f"in_features={config.K}, out_features={config.N}, bias={config.with_bias}"
        text += f", {config.A_dtype} x {config.W_dtype}"
        text += ", quantize_activation=True" if self.quantize_activation else ""
        return text + (f", group_size={config.group_length}" if config.with_scaling else "")

    # the call

    def forward(self, A: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """A: (..., in_features) in A_dtype (cast to it under autocast) -> (..., out_features).

        With quantize_activation: float16, bfloat16 or float32, under autocast too.
        """
        matmul = self.bitblas_matmul
        config = matmul.config
        if torch.is_autocast_enabled(A.device.type) and A.is_floating_point():
            if config.A_dtype in FLOAT_ACTIVATIONS:
                A = A.to(config.torch_A_dtype)
        qweight, weight, perm, scales, zeros, bias, global_scale = self._operands()
        if perm is not None:
            A = A.index_select(-1, perm)
        input_scale = None
        if self.quantize_activation:
            if output is None and (A.requires_grad or (bias is not None and bias.requires_grad)):
                return torch.ops.bitblas.quantized_matmul(
                    A, qweight, scales, zeros, bias, global_scale, config.key
                )
            if A.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    "output: not with an A that requires grad; the gradient would be lost"
                )
            A, input_scale = quantize_rows(A, config.A_dtype)
        return matmul.forward(
            A,
            weight if config.is_dense else qweight,
            scale=scales,
            zeros=zeros,
            bias=bias,
            output=output,
            input_scale=input_scale,
            global_scale=global_scale,
        )

    def _operands(self) -> tuple[Any, ...]:
        if not torch.compiler.is_compiling():
            try:  # past nn.Module's slow look-up
                return _fetch(self._buffers)
            except KeyError:  # one was made a parameter
                pass
        return tuple([getattr(self, name) for name in _FETCHED])

    def warmup(self, topk: int = 20) -> None:
        """Measure kernel choices for opt_M on the GPU: Matmul.hardware_aware_finetune."""
        self.bitblas_matmul.hardware_aware_finetune(topk=topk)

    def init_params(self) -> None:
        """Nothing to prepare: operands are passed as they are; kept for callers."""

    # loading

    def load_and_transform_weight(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
    ) -> None:
        """Take a logical weight (out_features, in_features) and the extras of the config.

        Floating extras are cast to the dtype of their buffer. Everything lands on the module's
        device; a module still on the CPU or meta device follows the weight's.

        Raises ValueError or TypeError that names the operand.
        """
        config = self.config
        codes = self.bitblas_matmul.weight_codes(weight)
        device = self.weight_device
        if device.type in ("cpu", "meta"):
            device = weight.device
        extras = {"scales": scales, "zeros": zeros, "bias": bias, "global_scale": global_scale}
        cast = {name: self._cast(name, x, device) for name, x in extras.items()}
        check_extras(
            config, device, cast["scales"], cast["zeros"], cast["bias"], cast["global_scale"]
        )
        self.perm = None
        if config.is_dense:
            self.weight = _own(codes, device)
        else:
            layout = native_layout(config, device.type)
            self.qweight = layout.pack(codes.to(device).contiguous(), config.bits)
            self.weight_format = checkpoint.format_tag(config, device)
        for name, x in cast.items():
            if x is not None:
                setattr(self, name, x)

    def _cast(self, name: str, x: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        if x is None:
            return None
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
        buffer = getattr(self, name)
        valid = self.config.scale_dtypes if name in ("scales", "zeros") else ()
        if (
            buffer is not None
            and x.dtype not in valid
            and x.is_floating_point()
            and buffer.is_floating_point()
        ):
            rounded = x.to(buffer.dtype)
            if x.device.type != "meta" and bool((x.isfinite() & ~rounded.isfinite()).any()):
                raise ValueError(f"{name}: has values beyond the range of {buffer.dtype}")
            x = rounded
        return _own(self._scale_bytes(x) if name == "scales" else x, device)

    def _scale_bytes(self, scales: torch.Tensor) -> torch.Tensor:
        """Encoded scales as the buffer holds them; others as they are."""
        encoded = self.config.format.scale_encoding is not None
        return scales.view(torch.uint8) if encoded and scales.itemsize == 1 else scales

    @property
    def weight_device(self) -> torch.device:
        """Where the layer's weight lies."""
        return (self.weight if self.config.is_dense else self.qweight).device

    def _native(self, packed: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A packed weight of any layout, moved to `device` in the layout that its backend reads."""
        config = self.config
        layout = native_layout(config, device.type)
        return convert(packed.to(device), config.bits, config.N, config.K, layout)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        W_dtype: str = "uint4",
        group_size: int = -1,
        with_zeros: bool | None = None,
        **kwargs: Any,
    ) -> Linear:
        """A Linear that holds an nn.Linear's weight, rounded to the nearest of W_dtype's values.

        with_zeros None: zero points for unsigned formats, none for the others. A_dtype and
        out_dtype are the weight's dtype unless given (A_dtype "int8" with quantize_activation);
        the other arguments are the constructor's.
        """
        weight = linear.weight.detach()
        dtype = {v: k for k, v in TORCH_DTYPES.items()}.get(weight.dtype, str(weight.dtype))
        A_dtype = "int8" if kwargs.get("quantize_activation") else dtype
        kwargs = {"A_dtype": A_dtype, "out_dtype": dtype, **kwargs}
        if with_zeros is None:
            with_zeros = get_format(W_dtype).source_format == "uint"
        module = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            W_dtype=W_dtype,
            group_size=group_size,
            with_scaling=True,
            with_zeros=with_zeros,
            **kwargs,
        )
        rounded = quantize_weight(weight, W_dtype, module.config.group_size, with_zeros)
        bias = None if linear.bias is None else linear.bias.detach()
        module.load_and_transform_weight(
            rounded.weight, rounded.scale, rounded.zeros, bias, rounded.global_scale
        )
        return module

    def repack_from_gptq(self, gptq_module: Any, device: torch.device | str | None = None) -> None:
        """Take the weights of a GPTQ layer whose zero points are stored minus one.

        gptq_module needs qweight (K*b/32, N) int32 and scales (G, N); qzeros (G, N*b/32) int32,
        bias and g_idx (act-order: any order of equal groups) where it has them. device: where the
        result lies; by default as load_and_transform_weight says.

        Raises ValueError where the layer's bits, sizes, groups or zero points are not this one's.
        """
        self._load_gptq(read_gptq(self.config, gptq_module, unpack_qzeros, device))

    def repack_from_gptq_v2(
        self, gptq_module: Any, device: torch.device | str | None = None
    ) -> None:
        """As repack_from_gptq, for zero points stored as they are."""
        self._load_gptq(read_gptq(self.config, gptq_module, unpack_qzeros_v2, device))

    def _load_gptq(self, read: GPTQOperands) -> None:
        self.load_and_transform_weight(read.weight, read.scales, read.zeros, read.bias)
        self.perm = None if read.perm is None else read.perm.to(self.weight_device)

    # moving and casting

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear:
        """Move or cast: the packed weight changes layout with the device. A_dtype (with out_dtype
        where it was the same) follows a cast between float16, bfloat16 and float32; where
        activations are quantised, out_dtype alone."""
        config = self._after_cast(fn)
        operands = {name: self._buffers[name] for name in self._operand_names}
        self._buffers.update(dict.fromkeys(operands))
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(operands)
        castable = self.config.A_dtype in FLOAT_ACTIVATIONS
        for name, x in operands.items():
            if x is None:
                continue
            if castable and x.dtype == self.torch_dtype and name != "global_scale":
                x = fn(x)
            else:  # bytes, or numbers whose dtype the config fixes: move only
                x = fn(x.contiguous().view(torch.uint8)).view(x.dtype)
            self._buffers[name] = x
        if config != self.config:
            self._set_config(config)
            if self.bias is not None:
                self.bias = self.bias.to(config.torch_out_dtype)
        if not config.is_dense:
            self.qweight = self._native(self.qweight, self.qweight.device)
            self.weight_format = checkpoint.format_tag(config, self.qweight.device)
        return self

    _operand_names = (
        "qweight",
        "weight_format",
        "weight",
        "perm",
        "scales",
        "zeros",
        "global_scale",
        "bias",
    )

    def _after_cast(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> MatmulConfig:
        """The config that a cast by `fn` asks for; ValueError for a dtype that A, or the result of
        a layer that quantises it, cannot have."""
        config = self.config
        if config.A_dtype not in FLOAT_ACTIVATIONS and not self.quantize_activation:
            return config
        before = config.torch_out_dtype if self.quantize_activation else config.torch_A_dtype
        dtype = fn(torch.empty(0, dtype=before, device=self.weight_device)).dtype
        if dtype == before:
            return config
        name = {d: n for n, d in TORCH_DTYPES.items()}.get(dtype, str(dtype))
        if self.quantize_activation:
            return dataclasses.replace(config, out_dtype=name)
        return dataclasses.replace(
            config,
            A_dtype=name,
            W_dtype=name if self.consistent else config.W_dtype,
            out_dtype=name if config.out_dtype == config.A_dtype else config.out_dtype,
            fast_decoding=None,
        )

    # checkpoints

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.config.is_dense:
            config = self.config
            plain = convert(self.qweight, config.bits, config.N, config.K, PLAIN)
            destination[prefix + "qweight"] = plain

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not self.config.is_dense and prefix + "qweight" in state_dict:
            assign = bool(local_metadata.get("assign_to_params_buffers"))
            size = len(prefix)
            entries = {k[size:]: v for k, v in state_dict.items() if k.startswith(prefix)}
            error = checkpoint.refusal(self.config, entries)
            if error is None and self.qweight.device.type == "meta" and not assign:
                error = "the module is on the meta device; use assign=True, or to_empty first"
            if error:
                error_msgs.append(f"{prefix.rstrip('.') or 'Linear'}: {error}")
                return
            self._adopt(state_dict, prefix, assign)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _adopt(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> None:
        """Bring a checkpoint's entries and this module's buffers into the same form."""
        packed, perm = state_dict[prefix + "qweight"], state_dict.get(prefix + "perm")
        device = packed.device if assign else self.qweight.device
        native = state_dict[prefix + "qweight"] = self._native(packed, device)
        if assign:  # the buffer that is replaced has the shape of another device's layout
            self.qweight = torch.empty_like(native, device="meta")
        self.perm = None if perm is None else torch.empty_like(perm, device=device)
        if (scales := state_dict.get(prefix + "scales")) is not None:
            state_dict[prefix + "scales"] = self._scale_bytes(scales)
        dtypes = {"scales": self.config.scale_dtypes, "zeros": self.config.zeros_dtypes}
        for name, valid in dtypes.items():
            buffer, incoming = getattr(self, name), state_dict.get(prefix + name)
            if buffer is not None and incoming is not None and incoming.dtype in valid:
                setattr(self, name, buffer.to(incoming.dtype))

    def load_original_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Load a state_dict of BitBLAS 0.1's Linear of the same configuration.

        Its qweight is in the interleaved layout where fast decoding was on (config.fast_decoding
        says whether it is by default; pass fast_decoding to the constructor where it was not).
        """
        self.load_and_transform_weight(
            checkpoint.read_original(self.config, state_dict["qweight"]),
            state_dict.get("scales"),
            state_dict.get("zeros"),
            state_dict.get("bias"),
        )


def _checked_switch(quantize_activation: bool, config: MatmulConfig) -> bool:
    """Raise unless a Linear of this config can quantise its input, if it is to."""
    if quantize_activation not in (True, False):
        raise TypeError(f"quantize_activation: got {quantize_activation!r}, expected True or False")
    if not quantize_activation:
        return False
    if config.A_dtype not in QUANTIZED_ACTIVATIONS:
        raise ValueError(
            f"A_dtype: got {config.A_dtype!r}, quantize_activation needs "
            f"{' or '.join(QUANTIZED_ACTIVATIONS)}"
        )
    if config.out_dtype not in FLOAT_ACTIVATIONS:
        raise ValueError(
            f"out_dtype: got {config.out_dtype!r}, quantize_activation needs one of "
            f"{', '.join(FLOAT_ACTIVATIONS)}"
        )
    return True


def _own(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A contiguous copy on `device`, no parameter and with no graph behind it."""
    return x.detach().to(device, copy=True, memory_format=torch.contiguous_format)

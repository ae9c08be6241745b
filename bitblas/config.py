"""MatmulConfig: the fields that define an operator, their defaults and their validation."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from .base import OptimizeStrategy, TransformKind
from .formats import FORMATS, WeightFormat, get_format

DEFAULT_M = (1, 16, 32, 64, 128, 256, 512, 1024)

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
    "int32": torch.int32,
    "int4": torch.int8,  # two per byte
    "e4m3_float8": torch.float8_e4m3fn,
    "e5m2_float8": torch.float8_e5m2,
}
FLOAT_ACTIVATIONS = ("float16", "bfloat16", "float32")
FP8_ACTIVATIONS = ("e4m3_float8", "e5m2_float8")
INTEGER_ACTIVATIONS = ("int8", "int4")
# what float activations are quantised to, and the greatest value of each
QUANTIZED_ACTIVATIONS = {"int8": 127.0, "e4m3_float8": 448.0}
# rows whose greatest magnitude is less are scaled as if it were this: scales and their reciprocals
# stay normal float32 numbers
LEAST_MAGNITUDE = 2.0**-100
A_DTYPES = FLOAT_ACTIVATIONS + INTEGER_ACTIVATIONS + FP8_ACTIVATIONS
OUT_DTYPES = (*FLOAT_ACTIVATIONS, "int32", "int8")
ACCUM_DTYPES = (*FLOAT_ACTIVATIONS, "int32")
LAYOUTS = ("nt", "nn", "tn", "tt")
ZEROS_MODES = ("original", "rescale", "quantized")
STORAGE_DTYPES: dict[str, torch.dtype] = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
}
SCALE_BYTES: dict[str, torch.dtype] = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}


def weight_dtypes(A_dtype: str) -> tuple[str, ...]:
    """The W_dtypes that an activation dtype multiplies."""
    if A_dtype in FLOAT_ACTIVATIONS:
        return tuple(FORMATS)
    if A_dtype == "int8":
        return tuple(name for name, f in FORMATS.items() if f.is_integer)
    if A_dtype == "int4":
        return ("int4", "int2")
    return ("e4m3_float8", "e5m2_float8", "int4", "int2", "fp4_e2m1", "mxfp4", "nvfp4")


@dataclass(frozen=True)
class MatmulConfig:
    """C[M,N] = A[M,K] · W[N,K]^T. The order of the fields is part of the interface.

    M: a tuning hint only (an int, a list or tuple, or None for a default list); operators accept
        every number of rows.
    N, K: output and input features, required.
    A_dtype, W_dtype, out_dtype: see docs/formats.md for the combinations.
    accum_dtype: accepted; floating products accumulate in float32, integer ones in int32.
    layout: "nt" (W given as (N, K)), "nn" (as (K, N)); "tn", "tt": the same with A as (K, M).
    group_size: values of k that share a scale; -1 is all of them.
    with_scaling, with_zeros, with_bias: which extras the operator takes.
    zeros_mode: "original" (v - z)*s, "rescale" v*s - z, "quantized" (v - zq)*s with packed zq.
    storage_dtype: the dtype that packed weights are viewed as.
    fast_decoding, propagate_a, propagate_b: layout switches of BitBLAS 0.1; read back, no effect.
    optimize_stratety: a tuning hint (also readable as optimize_strategy).

    Raises ValueError (TypeError for a value of the wrong kind) naming the field, the value and what
    is valid.
    """

    M: int | tuple[int, ...] | None = None
    N: int = None  # type: ignore[assignment]
    K: int = None  # type: ignore[assignment]
    A_dtype: str = "float16"
    W_dtype: str = "float16"
    out_dtype: str = "float16"
    accum_dtype: str = "float16"
    layout: str = "nt"
    with_bias: bool = False
    group_size: int = -1
    with_scaling: bool = False
    with_zeros: bool = False
    zeros_mode: str = "original"
    storage_dtype: str = "int8"
    fast_decoding: bool | None = None
    propagate_a: TransformKind | int | bool | None = None
    propagate_b: TransformKind | int | bool | None = None
    optimize_stratety: OptimizeStrategy = OptimizeStrategy.SingleBatchDecodeOnly

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_names()
        self._check_combination()
        self._check_group()
        self._check_hints()

    def __hash__(self) -> int:
        return hash(self.key)  # a kept string: calls look their config up in several caches

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    def _check_sizes(self) -> None:
        for field in ("N", "K"):
            value = getattr(self, field)
            if value is None:
                raise ValueError(f"{field}: required, a positive integer")
            self._set(field, _positive_int(field, value))
        if self.M is None:
            self._set("M", DEFAULT_M)
        elif isinstance(self.M, (list, tuple)):
            if not self.M:
                raise ValueError(
                    "M: got an empty list; give positive integers, or None for the default"
                )
            self._set("M", tuple(sorted({_positive_int("M", m) for m in self.M})))
        else:
            self._set("M", _positive_int("M", self.M))

    def _check_names(self) -> None:
        for flag in ("with_bias", "with_scaling", "with_zeros"):
            value = getattr(self, flag)
            if isinstance(value, torch.Tensor) or value not in (None, True, False):
                raise TypeError(f"{flag}: got {value!r}, expected True or False")
            self._set(flag, bool(value))
        if self.zeros_mode is None:
            self._set("zeros_mode", "original")
        _one_of("A_dtype", self.A_dtype, A_DTYPES)
        get_format(self.W_dtype)
        _one_of("out_dtype", self.out_dtype, OUT_DTYPES)
        _one_of("accum_dtype", self.accum_dtype, ACCUM_DTYPES)
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("zeros_mode", self.zeros_mode, ZEROS_MODES)
        _one_of("storage_dtype", self.storage_dtype, tuple(STORAGE_DTYPES))

    def _check_combination(self) -> None:
        valid = weight_dtypes(self.A_dtype)
        if self.W_dtype not in valid:
            raise ValueError(
                f"W_dtype: {self.W_dtype!r} does not go with A_dtype {self.A_dtype!r}; valid: "
                f"{', '.join(valid)}"
            )
        integer_product = self.A_dtype in INTEGER_ACTIVATIONS
        if self.out_dtype in ("int32", "int8") and not integer_product:
            raise ValueError(
                f"out_dtype: {self.out_dtype!r} needs integer activations, A_dtype is "
                f"{self.A_dtype!r}; "
                f"valid: {', '.join(FLOAT_ACTIVATIONS)}"
            )
        fmt = self.format
        if fmt.scale_encoding is not None:
            self._set("with_scaling", True)  # the scales are part of the format
        if self.with_zeros and not fmt.is_integer:
            raise ValueError(
                f"with_zeros: zero points go with integer formats only, W_dtype is {self.W_dtype!r}"
            )
        if self.A_dtype == "int4" and (self.K % 2 or self.layout in ("tn", "tt")):
            raise ValueError(
                "K: int4 activations are packed two per byte along K, so K must be even and "
                "layout "
                f"'nt' or 'nn'; got K={self.K}, layout {self.layout!r}"
            )

    def _check_group(self) -> None:
        fixed = self.format.fixed_group_size
        size = -1 if self.group_size is None else self.group_size
        if hasattr(size, "__index__") and not isinstance(size, bool):
            size = size.__index__()  # numpy's integers
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(
                f"group_size: got {self.group_size!r}, expected -1 or a positive divisor of "
                f"K={self.K}"
            )
        if fixed is not None:
            if size not in (-1, fixed):
                raise ValueError(f"group_size: {self.W_dtype} has groups of {fixed}, got {size}")
            size = fixed
        if size != -1 and self.K % size:
            raise ValueError(f"group_size: {size} does not divide K={self.K}")
        # one group is the whole row, however it was spelt, so that equal operators compare equal
        self._set("group_size", -1 if size == self.K and fixed is None else size)

    def _check_hints(self) -> None:
        if self.fast_decoding is None:
            self._set("fast_decoding", self._original_fast_decoding())
        elif self.fast_decoding not in (True, False):
            raise TypeError(
                f"fast_decoding: got {self.fast_decoding!r}, expected True, False or None"
            )
        self._set("fast_decoding", bool(self.fast_decoding))
        for field in ("propagate_a", "propagate_b"):
            value = getattr(self, field)
            try:
                self._set(field, TransformKind(int(value or 0)))
            except (TypeError, ValueError):
                raise ValueError(
                    f"{field}: got {value!r}, expected a TransformKind, 0..3 or a bool"
                ) from None
        try:
            self._set("optimize_stratety", OptimizeStrategy(self.optimize_stratety))
        except ValueError:
            raise ValueError(
                f"optimize_stratety: got {self.optimize_stratety!r}, expected an OptimizeStrategy"
            ) from None

    def _original_fast_decoding(self) -> bool:
        """Whether BitBLAS 0.1 would have interleaved this weight (it matters on import only)."""
        return (
            self.format.is_integer
            and self.bits in (1, 2, 4)
            and self.W_dtype != self.A_dtype
            and self.A_dtype != "bfloat16"
            and not (self.bits == 4 and self.A_dtype == "int8")
        )

    @property
    def optimize_strategy(self) -> OptimizeStrategy:
        return self.optimize_stratety

    @cached_property
    def format(self) -> WeightFormat:
        return get_format(self.W_dtype)

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def is_dense(self) -> bool:
        return self.format.is_dense

    @cached_property
    def group_length(self) -> int:
        """Values of k in a group, as a positive number."""
        return self.K if self.group_size == -1 else self.group_size

    @cached_property
    def num_groups(self) -> int:
        return self.K // self.group_length

    @cached_property
    def torch_A_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.A_dtype]

    @cached_property
    def torch_out_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.out_dtype]

    @cached_property
    def element_bits(self) -> int:
        """Width of the elements that GPU matrix instructions multiply: 16, or 8 for 8-bit and
        int4 activations."""
        return 16 if self.A_dtype in FLOAT_ACTIVATIONS else 8

    @cached_property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of scale and unpacked zeros; the first is what Linear allocates."""
        if self.format.scale_encoding is not None:
            return (SCALE_BYTES[self.format.scale_encoding], torch.uint8)
        if self.A_dtype in FLOAT_ACTIVATIONS:
            return (self.torch_A_dtype,)
        return (torch.float16, torch.float32)

    @cached_property
    def zeros_dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.int8,) if self.zeros_mode == "quantized" else self.scale_dtypes

    @cached_property
    def zeros_shape(self) -> tuple[int, int]:
        if self.zeros_mode == "quantized":
            return (self.num_groups, -(-self.N * self.bits // 8))
        return (self.N, self.num_groups)

    @cached_property
    def key(self) -> str:
        """The fields as a JSON object: what the registered operator carries; see from_key."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @cached_property
    def problem_key(self) -> str:
        """The fields that decide which kernel is fastest, as JSON: what tuning is kept by."""
        names = (
            "N",
            "K",
            "A_dtype",
            "W_dtype",
            "out_dtype",
            "group_size",
            "with_bias",
            "with_scaling",
        )
        fields = {name: getattr(self, name) for name in names}
        fields["zeros_mode"] = self.zeros_mode if self.with_zeros else None
        fields["k_split"] = getattr(self, "k_split", 1)
        return json.dumps(fields, separators=(",", ":"))

    @staticmethod
    @cache
    def from_key(key: str) -> MatmulConfig:
        """The config that `key` describes."""
        fields = json.loads(key)
        return (MatmulConfigWithSplitK if "k_split" in fields else MatmulConfig)(**fields)


@dataclass(frozen=True)
class MatmulConfigWithSplitK(MatmulConfig):
    """MatmulConfig of MatmulWithSplitK: GPU blocks share the reduction over K in k_split parts,
    which are summed in a fixed order. The CPU has no use for it and splits over N alone."""

    k_split: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "k_split", _positive_int("k_split", self.k_split))


def _positive_int(field: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{field}: got {value!r}, expected a positive integer")
    value = value.__index__()
    if value < 1:
        raise ValueError(f"{field}: got {value}, expected a positive integer")
    return value


def _one_of(field: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{field}: got {value!r}, expected one of {', '.join(valid)}")

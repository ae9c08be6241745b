"""The GPU backend: asks the plan for a kernel family and tile, and keeps what it prepared.

`matmul`, `dequantize` and `quantize_activation` take checked operands. `prepare` gives the call to
repeat for operands of the same kind, past the checks and torch's dispatcher.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch

from .. import cache, dense, plan
from ..config import TORCH_DTYPES, MatmulConfig
from ..layouts import layout_of
from ..operands import input_features
from . import batch, batch8, portable, quantize
from .compile import Source
from .launch import Launch
from .prepared import Prepared, architecture, current_device, execute

Operands = tuple[torch.Tensor | None, ...]  # A, W, scale, zeros, bias, input_scale, global_scale

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_MOST_KEPT = 4096  # kinds of calls; each a few KB
_prepared: dict[Any, Prepared] = {}
_generation = cache.generation()
_last_calls: dict[int, tuple[Any, ...]] = {}  # id of W -> what its last call was with


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
) -> None:
    """out (m, N) = A (m, K) times the packed weight, transposed, with the extras of the config.

    A: contiguous, m >= 1 (int4: (m, K/2) int8, low nibble first). W: packed in the GPU's layout.
    scale, zeros: (N, G), packed zeros (G, ceil(N*b/8)) int8. bias: (N,). input_scale: (m,) float32.
    global_scale: one float32. The caller has checked all of them.
    """
    if dense.is_faster(config, A.shape[0], A.device):
        weight = torch.empty((config.N, config.K), dtype=A.dtype, device=A.device)
        dequantize(config, W, weight, scale, zeros, global_scale)
        dense.matmul(A, weight, bias, out)
        return
    operands = (A, W, scale, zeros, bias, input_scale, global_scale)
    addresses = [x.data_ptr() for x in (*operands, out) if x is not None]
    if reduce(or_, addresses) % 16 == 0:
        prepared = _prepare(config, operands, A.shape[0])
        prepared.run(addresses, prepared.asks_settled and _settled(operands))
    else:
        execute(_launches(config, operands, out, A.shape[0], A.device), A.device)


def dequantize(
    config: MatmulConfig,
    W: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> None:
    """out (N, K), float16, bfloat16 or float32: the weight in float32, rounded once."""
    operands = (W, scale, zeros, global_scale, out)
    addresses = [x.data_ptr() for x in operands if x is not None]
    if reduce(or_, addresses) % 16:
        portable.dequantize(config, W, out, scale, zeros, global_scale)
        return
    key = ("dequantize", config, W.device, _kinds(operands))
    if (known := _kept(key)) is None:
        fakes: Any = tuple(map(_like, operands))
        step = portable.dequantize_launch(config, fakes[0], fakes[-1], *fakes[1:-1])
        known = _keep(key, [step], W.device, fakes)
    known.run(addresses)


def quantize_activation(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, dtype: str) -> None:
    """q (m, K) of `dtype` and scale (m,) of x (m, K); torch_ops says what they are."""
    addresses = [x.data_ptr(), q.data_ptr(), scale.data_ptr()]
    if reduce(or_, addresses) % 16:
        execute([quantize.launch(x, q, scale, dtype, _architecture(x.device))], x.device)
    else:
        _quantizer(x, dtype).run(addresses)


def _quantizer(x: torch.Tensor, dtype: str) -> Prepared:
    """What quantises tensors like x (..., K), contiguous and 16-byte aligned."""
    k = x.shape[-1]
    m = x.numel() // k
    key = ("quantize", dtype, x.dtype, m, k, x.device)
    if (known := _kept(key)) is None:
        fakes = (
            _meta((m, k), x.dtype),
            _meta((m, k), TORCH_DTYPES[dtype]),
            _meta((m,), torch.float32),
        )
        step = quantize.launch(*fakes, dtype, _architecture(x.device))
        known = _keep(key, [step], x.device, fakes)
    return known


class QuantizerCall:
    """The quantiser for tensors of one kind: call(x) is (q, scale)."""

    def __init__(self, x: torch.Tensor, dtype: str) -> None:
        self._run = _quantizer(x, dtype).run
        # empty_like takes a third of the time of torch.empty with a shape, a dtype and a device
        self._q = x.new_empty((), dtype=TORCH_DTYPES[dtype]).expand(x.shape)
        self._scale = x.new_empty((), dtype=torch.float32).expand(x.shape[:-1])

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """None where this is not how to do it."""
        try:
            address = x.data_ptr()
        except RuntimeError:  # a tensor within vmap or the like, which has none
            return None
        if address & 15:
            return None
        q, scale = torch.empty_like(self._q), torch.empty_like(self._scale)
        self._run([address, q.data_ptr(), scale.data_ptr()])
        return q, scale


def prepare_quantizer(x: torch.Tensor, dtype: str) -> QuantizerCall | None:
    """The call for plain, checked tensors like x; None where they need conversion first."""
    if not x.numel() or type(x) not in _PLAIN or not x.is_contiguous():
        return None
    return QuantizerCall(x, dtype)


def _architecture(device: torch.device) -> int:
    return architecture(current_device() if device.index is None else device.index)


def _nothing() -> None:
    """In place of a weak reference to an operand that is not there."""


def _settled(operands: Operands) -> bool:
    """Whether W, scale and zeros are, unchanged, those of W's last call (see launch.Settled)."""
    _, W, scale, zeros, *_ = operands
    assert W is not None
    try:
        changes = (
            W._version,
            None if scale is None else scale._version,
            None if zeros is None else zeros._version,
        )
    except RuntimeError:  # tensors made in inference mode do not count their changes
        return False
    key = id(W)
    last = _last_calls.get(key)
    if last is not None:
        before, same_W, same_scale, same_zeros = last
        if before == changes and same_W() is W and same_scale() is scale and same_zeros() is zeros:
            return True
    _last_calls[key] = (
        changes,
        weakref.ref(W, lambda _: _last_calls.pop(key, None)),
        _nothing if scale is None else weakref.ref(scale),
        _nothing if zeros is None else weakref.ref(zeros),
    )
    return False


def _launches(
    config: MatmulConfig, operands: Operands, out: torch.Tensor, m: int, device: torch.device
) -> list[Launch]:
    A, W, scale, zeros, bias, input_scale, global_scale = operands
    sections = plan.sections(config, m, device)
    if any(family in (batch, batch8) for family, *_ in sections):
        # TMA reads from multiples of them, and scales are read several at a time
        A, W, scale, zeros = map(_on_16_bytes, (A, W, scale, zeros))
    assert A is not None and W is not None
    steps: list[Launch] = []
    first = 0
    for family, tile, rows in sections:
        some = slice(first, first + rows)
        first += rows
        scales = None if input_scale is None else input_scale[some]
        steps += family.launches(
            config, A[some], W, out[some], scale, zeros, bias, scales, global_scale, tile
        )
    return steps


def _on_16_bytes(x: torch.Tensor | None) -> torch.Tensor | None:
    return x.clone() if x is not None and x.data_ptr() % 16 else x


def sources(
    config: MatmulConfig,
    m: int,
    device: torch.device,
    dtypes: Sequence[torch.dtype | None],
) -> list[Source]:
    """The kernels of a product of m rows on a GPU; dtypes of scale, zeros, bias as they are given.

    Whether 8-bit activations come with an input_scale is not known, so both are there.
    """

    def optional(shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor | None:
        return None if dtype is None else _meta(shape, dtype)

    A = _meta((m, input_features(config)), config.torch_A_dtype)
    W = _meta(portable.layout(config).shape(config.bits, config.N, config.K), torch.int8)
    scale = optional((config.N, config.num_groups), dtypes[0])
    zeros = optional(config.zeros_shape, dtypes[1])
    bias = optional((config.N,), dtypes[2])
    global_scale = _meta((1,), torch.float32) if config.format.has_global_scale else None
    input_scales: list[torch.Tensor | None] = [None]
    if config.torch_A_dtype.itemsize == 1:
        input_scales.append(_meta((m,), torch.float32))
    out = _meta((m, config.N), config.torch_out_dtype)
    return [
        Source(step)
        for input_scale in input_scales
        for step in _launches(
            config, (A, W, scale, zeros, bias, input_scale, global_scale), out, m, device
        )
    ]


def quantizer_source(config: MatmulConfig, m: int, arch: int) -> Source:
    """The kernel that quantises m rows of out_dtype to A_dtype, on compute capability arch."""
    shape = (m, config.K)
    x, q = _meta(shape, config.torch_out_dtype), _meta(shape, config.torch_A_dtype)
    return Source(quantize.launch(x, q, _meta((m,), torch.float32), config.A_dtype, arch))


def _prepare(config: MatmulConfig, operands: Operands, m: int) -> Prepared:
    """What runs a call on operands of this kind, all of them contiguous and 16-byte aligned."""
    device = operands[0].device  # type: ignore[union-attr]
    key = (config, m, device, _kinds(operands), _tf32(config))
    known = _kept(key)
    if known is None:
        A, W, scale, zeros, bias, input_scale, global_scale = map(_like, operands)
        assert A is not None and W is not None
        A, W = A.view(m, A.shape[-1]), W.view(torch.int8)
        input_scale = None if input_scale is None else input_scale.view(-1)
        fakes = (A, W, scale, zeros, bias, input_scale, global_scale)
        out = torch.empty((m, config.N), dtype=config.torch_out_dtype, device="meta")
        known = _keep(key, _launches(config, fakes, out, m, device), device, (*fakes, out))
    return known


def _like(x: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor of the same kind without memory, but with a storage that it is known by."""
    return None if x is None else _meta(x.shape, x.dtype)


def _meta(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _kinds(operands: Operands) -> tuple[Any, ...]:
    return tuple([None if x is None else (x.dtype, x.numel()) for x in operands])


def _kept(key: Any) -> Prepared | None:
    global _generation
    if _generation != cache.generation():
        _generation = cache.generation()
        _prepared.clear()
    return _prepared.get(key)


def _keep(key: Any, steps: list[Launch], device: torch.device, fakes: Operands) -> Prepared:
    present = [x for x in fakes if x is not None]
    order = {x.untyped_storage()._cdata: i for i, x in enumerate(present)}
    known = Prepared(steps, device, len(present), lambda x: order[x.untyped_storage()._cdata])
    if len(_prepared) >= _MOST_KEPT:
        _prepared.clear()
    _prepared[key] = known
    return known


def _tf32(config: MatmulConfig) -> bool | None:
    """Whether TF32 is allowed, where it makes a difference."""
    return bool(torch.backends.cuda.matmul.allow_tf32) if config.A_dtype == "float32" else None


class Call:
    """A product of operands of one kind: call(operands) is the result."""

    def __init__(self, config: MatmulConfig, operands: Operands, m: int) -> None:
        A = operands[0]
        assert A is not None
        self._generation = cache.generation()
        self._checked_only = dense.is_faster(config, m, A.device)  # for now: that may change
        if self._checked_only:
            return
        prepared = _prepare(config, operands, m)
        self._run, self._asks_settled = prepared.run, prepared.asks_settled
        # empty_like takes half the time of torch.empty with a shape, a dtype and a device
        self._like = A.new_empty(1, dtype=config.torch_out_dtype).expand(*A.shape[:-1], config.N)
        self._tf32 = _tf32(config)

    def __call__(self, operands: Operands) -> torch.Tensor | None:
        """None where this is no longer, or for these operands not, how to do it."""
        if self._checked_only:
            return None
        try:
            addresses = [x.data_ptr() for x in operands if x is not None]
        except RuntimeError:  # a tensor within vmap or the like, which has none
            return None
        if reduce(or_, addresses) & 15 or self._generation != cache.generation():
            return None
        if self._tf32 is not None and self._tf32 != torch.backends.cuda.matmul.allow_tf32:
            return None
        out = torch.empty_like(self._like)
        addresses.append(out.data_ptr())
        self._run(addresses, self._asks_settled and _settled(operands))
        return out


def prepare(config: MatmulConfig, operands: Operands) -> Call | None:
    """The call for plain, checked operands like these; None where they need conversion first."""
    A, W, *_ = operands
    assert A is not None and W is not None
    m = A.numel() // max(A.shape[-1], 1)
    packed = not config.is_dense and layout_of(W) is portable.layout(config)
    if not packed or m == 0 or not _all_plain(operands):
        return None
    return Call(config, operands, m)


def _all_plain(operands: Iterable[torch.Tensor | None]) -> bool:
    return all(
        x is None or (type(x) in _PLAIN and x.is_contiguous() and not x.requires_grad)
        for x in operands
    )

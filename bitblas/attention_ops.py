"""The registered attention operators, and what serves a call.

Behind the border keys are [batch, tokens, heads, dim] whatever their layout, which their strides
tell.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .attention_config import FlashAttenConfig
from .attention_operands import check_call, check_output
from .config import TORCH_DTYPES
from .log import logger
from .quantization.kv_cache import KV_DTYPES, QuantizedKV
from .torch_ops import share_memory

if TYPE_CHECKING:
    from .kernels.compile import Source

BACKENDS = ("auto", "triton", "cudnn", "flash", "math", "torch")
_TORCH_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
_MOST_DIM = 256  # of "triton", "cudnn" and "flash"
# Of more queries of a key head, quantised keys and values are expanded to 16 bits first: that costs
# once what reading codes within the kernel costs each tile of queries.
MOST_ROWS_IN_PLACE = 128

_CONTIGUOUS = torch.contiguous_format
Optional = torch.Tensor | None
_OPERANDS = (
    "Tensor Q, Tensor K, Tensor V, Tensor? k_scale, Tensor? k_zeros, Tensor? v_scale, "
    "Tensor? v_zeros, Tensor? kv_len, str config, str backend"
)
_library = torch.library.Library("bitblas", "FRAGMENT")
_library.define(f"attention({_OPERANDS}) -> Tensor")
_library.define(f"attention_out({_OPERANDS}, Tensor(a!) out) -> ()")


def choose(
    config: FlashAttenConfig,
    backend: str,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    lengths_vary: bool = False,
    device: torch.device | None = None,
) -> str:
    """What serves a call: the backend that is asked for, or for "auto" what should be fastest.

    lengths_vary: kv_len is a tensor. device: where the operands will be, if not there yet. Raises
    ValueError where the backend cannot serve the call.
    """
    device = device or Q.device
    gpu = device.type == "cuda"
    q_len, k_len = Q.shape[1], V.shape[1]
    if backend == "auto":
        if not gpu or config.dim > _MOST_DIM:
            return "torch"
        oblique = config.is_causal and q_len != k_len
        in_place = config.is_quantized and not _expands(config, q_len)
        few = _rows(config, q_len) <= 16
        if in_place or few or lengths_vary or oblique or not _cudnn_serves(Q, K, V, device):
            return "triton"
        return "cudnn"
    if backend in ("triton", "cudnn", "flash"):
        if not gpu:
            raise ValueError(f"backend: {backend!r} runs on GPUs, Q is on {device}")
        if config.dim > _MOST_DIM:
            raise ValueError(
                f"backend: {backend!r} takes dims of up to {_MOST_DIM}, got {config.dim}"
            )
    if backend == "cudnn" and config.is_causal and q_len != k_len:
        raise ValueError(
            f"backend: 'cudnn' masks causally for equal lengths only, got {q_len} queries and "
            f"{k_len} keys"
        )
    if backend in ("cudnn", "flash") and lengths_vary:
        raise ValueError(f"backend: {backend!r} takes no tensor as kv_len")
    return backend


def _cudnn_serves(Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, device: torch.device) -> bool:
    """Whether torch hands attention on a device over to cuDNN."""
    version = torch.backends.cudnn.version() or 0
    capability = torch.cuda.get_device_capability(device)
    most_dim = 256 if capability == (9, 0) and version >= 91000 else 128
    return (
        version >= 90000
        and capability >= (8, 0)
        and Q.shape[3] <= most_dim
        and Q.shape[3] % 8 == 0
        and V.shape[1] > 1
        and not any(x.data_ptr() % 16 for x in (Q, K, V))
        and not torch.are_deterministic_algorithms_enabled()
    )


def _rows(config: FlashAttenConfig, q_len: int) -> int:
    """Queries that read one key head."""
    assert config.kv_heads is not None
    return config.heads // config.kv_heads * q_len


def _expands(config: FlashAttenConfig, q_len: int) -> bool:
    """Whether quantised keys and values become 16-bit copies first."""
    return config.is_quantized and _rows(config, q_len) > MOST_ROWS_IN_PLACE


@cache
def _report(choice: str, wanted: str, key: str, few: bool, device: str) -> None:
    """Once for each kind of call."""
    kind = "decode" if few else "prefill"
    logger.info("attention on %s, %s, backend %r: %s; %s", device, kind, wanted, choice, key)


def _run(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    numbers: tuple[Optional, ...],
    kv_len: Optional,
    key: str,
    backend: str,
    out: Optional,
) -> torch.Tensor:
    """Attention over checked operands, into `out` or a new, contiguous tensor."""
    config = FlashAttenConfig.from_key(key)
    K = check_call(config, Q, K, V, numbers, kv_len)
    if out is not None:
        check_output(Q, out)
    if Q.numel() == 0 or V.shape[1] == 0:
        return torch.zeros_like(Q, memory_format=_CONTIGUOUS) if out is None else out.zero_()
    choice = choose(config, backend, Q, K, V, kv_len is not None)
    _report(choice, backend, key, Q.shape[1] <= 16, str(Q.device))
    if choice == "triton":
        return _by_own_kernels(config, Q, K, V, numbers, kv_len, out)
    product = _by_torch(config, choice, Q, K, V, numbers, kv_len)
    return product.contiguous() if out is None else out.copy_(product)


def _attention(
    Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor,
    k_scale: Optional, k_zeros: Optional, v_scale: Optional, v_zeros: Optional, kv_len: Optional,
    config: str, backend: str,
) -> torch.Tensor:  # fmt: skip
    return _run(Q, K, V, (k_scale, k_zeros, v_scale, v_zeros), kv_len, config, backend, None)


def _attention_out(
    Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor,
    k_scale: Optional, k_zeros: Optional, v_scale: Optional, v_zeros: Optional, kv_len: Optional,
    config: str, backend: str, out: torch.Tensor,
) -> None:  # fmt: skip
    _run(Q, K, V, (k_scale, k_zeros, v_scale, v_zeros), kv_len, config, backend, out)


def _by_own_kernels(
    config: FlashAttenConfig,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    numbers: tuple[Optional, ...],
    kv_len: Optional,
    out: Optional,
) -> torch.Tensor:
    from .kernels import attention as kernels

    if _expands(config, Q.shape[1]):
        K, V, numbers = _expanded(config, Q, K, V, numbers)
    into = out
    if out is None or out.stride(3) != 1 or any(share_memory(out, x) for x in (Q, K, V)):
        into = torch.empty_like(Q, memory_format=_CONTIGUOUS)
    Q, V = (x if x.stride(3) == 1 else x.contiguous() for x in (Q, V))
    K = K if 1 in (K.stride(3), K.stride(1)) else K.contiguous()
    operands = kernels.Operands(Q, K, V, *numbers)._replace(lengths=kv_len)
    assert into is not None
    kernels.run(operands, into, config.is_causal)
    return into if out is None or into is out else out.copy_(into)


def _expanded(
    config: FlashAttenConfig,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    numbers: tuple[Optional, ...],
) -> tuple[torch.Tensor, torch.Tensor, tuple[Optional, ...]]:
    """K and V in 16 bits, contiguous along dim, on a GPU: copies of what is not."""
    from .kernels import attention as kernels

    if config.K_dtype != config.Q_dtype or K.stride(3) != 1:
        K = kernels.expand(K, Q, *numbers[:2])
    if config.V_dtype != config.Q_dtype:
        V = kernels.expand(V, Q, *numbers[2:])
    return K, V, (None,) * 4


def sources(
    config: FlashAttenConfig, backend: str, q_len: int, device: torch.device
) -> list[Source]:
    """The kernels of a GPU's calls with q_len queries, of the config's batch and length, with an
    int32 tensor as kv_len and without; scales have Q's dtype."""
    from .kernels import attention as kernels

    dtype = TORCH_DTYPES[config.Q_dtype]
    found = []
    with torch.device("meta"):
        Q = torch.empty((config.batch, q_len, config.heads, config.dim), dtype=dtype)
        K, *k_numbers = _empty_cache(config, config.K_dtype, dtype)
        V, *v_numbers = _empty_cache(config, config.V_dtype, dtype)
        if config.layout == "ntn":
            K = K.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
        for lengths in (None, torch.empty(config.batch, dtype=torch.int32)):
            try:
                choice = choose(config, backend, Q, K, V, lengths is not None, device)
            except ValueError:  # there are no such calls
                continue
            given = kernels.Operands(Q, K, V, *k_numbers, *v_numbers)
            if choice in ("cudnn", "flash") or choice == "triton" and _expands(config, q_len):
                wide = torch.empty(V.shape[:3] + Q.shape[3:], dtype=dtype)
                if config.K_dtype != config.Q_dtype or K.stride(3) != 1:
                    found.append(kernels.expand_source(K, wide, k_numbers, device))
                if config.V_dtype != config.Q_dtype:
                    found.append(kernels.expand_source(V, wide, v_numbers, device))
                given = kernels.Operands(Q, wide, wide)
            if choice == "triton":
                given = given._replace(lengths=lengths)
                found += kernels.sources(given, config.is_causal, device)
    return found


def _empty_cache(config: FlashAttenConfig, kind: str, dtype: torch.dtype) -> list[Any]:
    """Keys or values of a config, scale and zeros."""
    assert config.kv_heads is not None
    shape = (config.batch, config.seq_len, config.kv_heads, config.dim)
    if kind in KV_DTYPES:
        return list(QuantizedKV.empty(*shape, kind, dtype))
    return [torch.empty(shape, dtype=dtype), None, None]


def differentiable(
    config: FlashAttenConfig,
    backend: str,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    numbers: tuple[Optional, ...],
    kv_len: Optional,
    out: Optional,
) -> torch.Tensor:
    """Attention by torch's own operators, which have gradients. Raises ValueError for what has
    none: quantised keys or values and their scales, lengths in a tensor, the backend "triton"."""
    K = check_call(config, Q, K, V, numbers, kv_len)
    if out is not None:
        check_output(Q, out)
    if config.is_quantized or kv_len is not None or backend == "triton":
        names = ("Q", "K", "V", "k_scale", "k_zeros", "v_scale", "v_zeros")
        operands = zip(names, (Q, K, V, *numbers))
        wanting = ", ".join(name for name, x in operands if x is not None and x.requires_grad)
        raise ValueError(
            f"{wanting}: requires a gradient, which goes with 16-bit keys and values, no tensor "
            "as kv_len and a backend of torch; detach it or use torch.no_grad()"
        )
    wanted = "torch" if backend == "auto" else choose(config, backend, Q, K, V)
    product = _by_torch(config, wanted, Q, K, V, numbers, None)
    return product if out is None else out.copy_(product)


def _by_torch(
    config: FlashAttenConfig,
    choice: str,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    numbers: tuple[Optional, ...],
    kv_len: Optional,
) -> torch.Tensor:
    """By scaled_dot_product_attention. "cudnn" and "flash" want 16 bits, contiguous along dim; else
    quantised keys and values are expanded to float32."""
    dtype = Q.dtype
    if choice in ("cudnn", "flash"):
        K, V, numbers = _expanded(config, Q, K, V, numbers)
        Q, V = (x if x.stride(3) == 1 else x.contiguous() for x in (Q, V))
    elif config.is_quantized:
        k_scale, k_zeros, v_scale, v_zeros = numbers
        Q, K, V = Q.float(), _values(K, k_scale, k_zeros), _values(V, v_scale, v_zeros)
    if kv_len is None:
        return _scaled_dot_product(config, choice, Q, K, V).to(dtype)
    # masks, not slices: the lengths stay on their device
    lengths = kv_len.clamp(0, V.shape[1])[:, None, None]
    tokens = torch.arange(V.shape[1], device=Q.device)
    behind = (tokens >= lengths).transpose(1, 2).unsqueeze(3)  # [batch, k_len, 1, 1]
    K, V = (x.masked_fill(behind, 0) for x in (K, V))  # a weight of zero would keep their NaNs
    seen = lengths.expand(-1, Q.shape[1], 1)  # keys of each query
    if config.is_causal:
        seen = seen + torch.arange(1 - Q.shape[1], 1, device=Q.device)[:, None]
    none = seen <= 0
    mask = (tokens < seen) | none  # no row is empty, of which softmax may be NaN
    product = _scaled_dot_product(config, choice, Q, K, V, mask.unsqueeze(1))
    return product.masked_fill(none.unsqueeze(3), 0).to(dtype)


def _values(x: torch.Tensor, scale: Optional, zeros: Optional) -> torch.Tensor:
    return x.float() if scale is None else QuantizedKV(x, scale, zeros).dequantize()


def _scaled_dot_product(
    config: FlashAttenConfig,
    choice: str,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    mask: Any = None,
) -> torch.Tensor:
    """mask: bool, in place of the config's."""
    causal = config.is_causal and mask is None
    oblique = causal and Q.shape[1] != K.shape[1]
    backend = _TORCH_BACKENDS.get(choice)
    if oblique and choice == "flash":
        from torch.nn.attention.bias import causal_lower_right  # brings torch._dynamo with it

        mask = causal_lower_right(Q.shape[1], K.shape[1])
    elif oblique:
        mask = torch.ones((Q.shape[1], K.shape[1]), dtype=torch.bool, device=Q.device)
        mask = mask.tril(K.shape[1] - Q.shape[1])
    with nullcontext() if backend is None else sdpa_kernel(backend):
        product: torch.Tensor = scaled_dot_product_attention(
            Q.transpose(1, 2),
            K.transpose(1, 2),
            V.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal and not oblique,
            enable_gqa=config.heads != config.kv_heads,
        )
    return product.transpose(1, 2)


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _device)
    _library.impl("attention_out", _attention_out, _device)


@torch.library.register_fake("bitblas::attention", lib=_library)
def _(Q, K, V, k_scale, k_zeros, v_scale, v_zeros, kv_len, config, backend):  # type: ignore[no-untyped-def]
    cfg = FlashAttenConfig.from_key(config)
    check_call(cfg, Q, K, V, (k_scale, k_zeros, v_scale, v_zeros), kv_len)
    return torch.empty_like(Q, memory_format=_CONTIGUOUS)


@torch.library.register_fake("bitblas::attention_out", lib=_library)
def _(Q, K, V, k_scale, k_zeros, v_scale, v_zeros, kv_len, config, backend, out):  # type: ignore[no-untyped-def]
    cfg = FlashAttenConfig.from_key(config)
    check_call(cfg, Q, K, V, (k_scale, k_zeros, v_scale, v_zeros), kv_len)
    check_output(Q, out)

"""warmup: every kernel that a model's calls will need, compiled before the first of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import attention_ops
from .attention import FlashAtten
from .attention_config import FlashAttenConfig
from .config import MatmulConfig
from .linear import Linear
from .matmul import Matmul, hinted_rows

if TYPE_CHECKING:
    from .kernels.compile import Source

_CPU_ROWS = 64  # rows of the weight that a CPU product is tried on: kernels do not depend on N


@dataclasses.dataclass(frozen=True)
class _Product:
    """A kind of call, except for its rows; dtypes of the extras, None for those not given."""

    config: MatmulConfig
    device: torch.device
    dtypes: tuple[torch.dtype | None, ...]  # of scale, zeros, bias
    quantizes: bool = False  # a layer's whose input, taken to be of out_dtype, is quantised first


@dataclasses.dataclass(frozen=True)
class _Attention:
    """A kind of call of FlashAtten, except for its queries."""

    config: FlashAttenConfig
    device: torch.device
    backend: str


def warmup(
    what: nn.Module | MatmulConfig | Matmul | FlashAttenConfig | FlashAtten | Iterable[Any],
    m: int | Iterable[int] | None = None,
    device: torch.device | str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Compile, and load, the kernels that calls with m rows of A will need.

    what: a module (its bitblas.Linear layers), a Matmul, a FlashAtten, a config of those, or
    several of all that. m: one or more numbers of rows, for attention of queries; by default each
    config's hint M, for attention 1 and seq_len. device: where the calls will run; by default where
    a layer lies and what an operator is for. workers: how many processes compile at once; by
    default the CPUs of this one. Layers that quantise their input are prepared for one in their
    out_dtype.

    Each distinct kernel is compiled once, in processes that see no GPU, and kept in Triton's disk
    cache, so that later processes find it too. 8-bit activations are prepared for with and without
    an input_scale, attention for caches of the config's batch and seq_len, with an int32 tensor as
    kv_len and without. On the CPU kernels take well under a second and are compiled in this
    process; attention has none.

    Raises TypeError or ValueError for arguments that it cannot use, RuntimeError where a kernel
    does not compile.
    """
    rows = _checked_rows(m)
    if workers is not None and workers < 1:
        raise ValueError(f"workers: got {workers}, expected a positive number")
    products = list(dict.fromkeys(_products(what, None if device is None else _device(device))))
    calls = [
        (product, count)
        for product in products
        if isinstance(product, _Attention) or not product.config.is_dense
        for count in rows or _expected_rows(product)
    ]
    on_cpu = [
        (product, count)
        for product, count in calls
        if isinstance(product, _Product) and product.device.type == "cpu"
    ]
    _warm_cpu(on_cpu, progress)
    for index in sorted({call[0].device.index for call in calls if call[0].device.type == "cuda"}):
        here = [call for call in calls if call[0].device == torch.device("cuda", index)]
        _warm_gpu(here, index, workers or _cpus(), progress)


def _expected_rows(product: _Product | _Attention) -> tuple[int, ...]:
    if isinstance(product, _Product):
        return hinted_rows(product.config)
    return tuple(sorted({1, product.config.seq_len}))


def _checked_rows(m: int | Iterable[int] | None) -> tuple[int, ...]:
    if m is None:
        return ()
    rows = tuple(m) if isinstance(m, Iterable) else (m,)
    wrong = [x for x in rows if isinstance(x, bool) or not isinstance(x, int) or x < 1]
    if wrong or not rows:
        raise ValueError(f"m: got {m!r}, expected positive numbers of rows")
    return tuple(dict.fromkeys(rows))


def _device(device: torch.device | str) -> torch.device:
    """A device with its index; ValueError for one that no call can run on."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise ValueError(f"device: got {str(device)!r}, expected 'cpu' or a GPU of this machine")
    return device


def _products(what: Any, device: torch.device | None) -> Iterator[_Product | _Attention]:
    if isinstance(what, nn.Module):
        layers = [layer for layer in what.modules() if isinstance(layer, Linear)]
        if not layers:
            raise ValueError(f"what: {type(what).__name__} holds no bitblas.Linear")
        for layer in layers:
            extras = (layer.scales, layer.zeros, layer.bias)
            dtypes = tuple(None if x is None else x.dtype for x in extras)
            where = device or _device(layer.weight_device)
            yield _Product(layer.config, where, dtypes, layer.quantize_activation)
    elif isinstance(what, (Matmul, MatmulConfig)):
        operator = what if isinstance(what, Matmul) else Matmul(what)
        config = operator.config
        dtypes = (
            config.scale_dtypes[0] if config.with_scaling else None,
            config.zeros_dtypes[0] if config.with_zeros else None,
            config.torch_out_dtype if config.with_bias else None,
        )
        yield _Product(
            config, device or _device("cuda" if operator.target.is_gpu else "cpu"), dtypes
        )
    elif isinstance(what, (FlashAtten, FlashAttenConfig)):
        attention = what if isinstance(what, FlashAtten) else FlashAtten(what)
        where = device or _device("cuda" if attention.target.is_gpu else "cpu")
        yield _Attention(attention.config, where, attention.backend)
    elif isinstance(what, Iterable) and not isinstance(what, (str, bytes, torch.Tensor)):
        for part in what:
            yield from _products(part, device)
    else:
        raise TypeError(
            f"what: got {type(what).__name__}, expected a module, a Matmul, a FlashAtten, "
            "one of their configs or several of those"
        )


def _cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], object]]:
    """A progress bar, if it is wanted; gives what moves it on by one kernel."""
    if not shown:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="Compiling", unit=" kernels") as bar:
        yield bar.update


def _warm_cpu(calls: Sequence[tuple[_Product, int]], progress: bool) -> None:
    """Run a product of each kind on a few rows of weights."""
    if not calls:
        return
    with _bar(len(calls), progress) as step:
        for product, m in calls:
            config = product.config
            small = dataclasses.replace(config, N=min(config.N, _CPU_ROWS))
            Matmul(small, target="cpu").random_call(m)()
            step()


def _warm_gpu(
    calls: Sequence[tuple[_Product | _Attention, int]], index: int, workers: int, progress: bool
) -> None:
    from .kernels import gpu, prepared

    found: dict[str, Source] = {}
    arch = prepared.architecture(index)
    for product, m in calls:
        if isinstance(product, _Attention):
            sources = attention_ops.sources(product.config, product.backend, m, product.device)
        else:
            sources = gpu.sources(product.config, m, product.device, product.dtypes)
            if product.quantizes:
                sources.append(gpu.quantizer_source(product.config, m, arch))
        for source in sources:
            found.setdefault(source.key, source)
    compile_sources(list(found.values()), arch, workers, progress)
    for source in found.values():
        prepared.load(source, index)


def compile_sources(
    sources: Sequence[Source], arch: int, workers: int, progress: bool = False
) -> None:
    """Have the binary of each source in this process: from disk, or compiled in parallel."""
    from .kernels import worker

    missing = [source for source in sources if not source.on_disk(arch)]
    with _bar(len(missing), progress) as step:
        if workers > 1 and len(missing) > 1:
            worker.compile_all(missing, arch, workers, step)
            missing = []
        for source in missing:
            source.binary(arch)
            step()
    for source in sources:
        source.binary(arch)

"""The products of a whole model's layers, one after the other, as decoding runs them.

    x -> q, k, v -> q + k * v -> o -> x + o -> gate, up -> silu(gate) * up -> down -> x + down

Each elementwise step makes the input of the next product, so that no product can start before the
one it follows is over. On a GPU all layers are one CUDA graph; every layer has weights of its own.
Attention, norms and rotations are left out: only the products and what joins them is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..config import MatmulConfig
from ..matmul import Matmul
from ..precompile import warmup
from .cases import Weight, draw_weight, make_config, poisoned, relative_error, tolerance
from .measure import WrongResultError, dense_dtype
from .timing import Timer

Linear = Callable[[torch.Tensor, torch.Tensor], object]  # x, out


@dataclass(frozen=True)
class Model:
    """Sizes of a layer: of the hidden state, of k and v together with each other, of the MLP."""

    hidden: int
    kv: int
    mlp: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the layer's products, in the order in which they run."""
        hidden, kv, mlp = self.hidden, self.kv, self.mlp
        return {
            "q": (hidden, hidden),
            "k": (kv, hidden),
            "v": (kv, hidden),
            "o": (hidden, hidden),
            "gate": (mlp, hidden),
            "up": (mlp, hidden),
            "down": (hidden, mlp),
        }


MODELS = {
    "llama-8b": Model(hidden=4096, kv=1024, mlp=14336),
    "llama-70b": Model(hidden=8192, kv=1024, mlp=28672),
}


@dataclass(frozen=True)
class ChainRow:
    """Microseconds of one layer: ours, the dense products, and the reads of the weights alone."""

    model: str
    w: str
    a: str
    m: int
    layers: int
    us: float
    dense_us: float
    read_us: float
    rel_err: float  # the largest of all products of the first and the last layer


class Layer:
    """Buffers of one layer and the calls that fill them."""

    def __init__(self, model: Model, x: torch.Tensor, linears: dict[str, Linear]) -> None:
        self.x, self.linears, self.model = x, linears, model
        self.out = {
            name: poisoned((x.shape[0], n), x.dtype, x.device)
            for name, (n, _) in model.shapes().items()
        }
        self.mixed, self.middle, self.end = (torch.empty_like(x) for _ in range(3))
        self.act = torch.empty_like(self.out["gate"])
        self.inputs = dict.fromkeys(("q", "k", "v"), x)
        self.inputs.update(o=self.mixed, gate=self.middle, up=self.middle, down=self.act)

    def _linear(self, *names: str) -> None:
        for name in names:
            self.linears[name](self.inputs[name], self.out[name])

    def run(self) -> None:
        out, m = self.out, self.x.shape[0]
        self._linear("q", "k", "v")
        heads = (m, -1, self.model.kv)
        torch.addcmul(
            out["q"].view(heads), out["k"].view(heads), out["v"].view(heads),
            out=self.mixed.view(heads),
        )  # fmt: skip
        self._linear("o")
        torch.add(self.x, out["o"], out=self.middle)
        self._linear("gate", "up")
        if self.x.is_cuda:
            from .kernels import silu_mul

            silu_mul(out["gate"], out["up"], self.act)
        else:
            torch.mul(torch.nn.functional.silu(out["gate"]), out["up"], out=self.act)
        self._linear("down")
        torch.add(self.middle, out["down"], out=self.end)


def _layers(model: Model, x: torch.Tensor, linears: Sequence[dict[str, Linear]]) -> list[Layer]:
    layers = []
    for one in linears:
        layers.append(Layer(model, x, one))
        x = layers[-1].end
    return layers


def _run_all(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.run()


def _error(layers: Sequence[Layer], weights: dict[int, dict[str, Weight]]) -> float:
    """The largest relative error of a product against its own input, as the last run left them."""
    return max(
        relative_error(layers[i].out[name], layers[i].inputs[name], weight)
        for i, named in weights.items()
        for name, weight in named.items()
    )


def time_chain(
    name: str,
    timer: Timer,
    W_dtype: str,
    m: int,
    *,
    A_dtype: str,
    group: int | None = None,
    zeros: bool | None = None,
    layers: int | None = None,
) -> ChainRow:
    """Time the layers of MODELS[name] with our products and with dense ones.

    layers: how many; by default as many as make the quantised weights cold, four at least.
    Raises WrongResultError where a product, taken as the timed graph left it, is wrong.
    """
    model, device = MODELS[name], timer.device
    configs = {
        key: make_config(W_dtype, A_dtype, n, k, group=group, zeros=zeros)
        for key, (n, k) in model.shapes().items()
    }
    if device.type == "cuda":
        warmup(configs.values(), m, device)
    operators = {
        key: Matmul(config, target="cpu" if device.type == "cpu" else None)
        for key, config in configs.items()
    }
    first = {key: draw_weight(configs[key], operators[key], device, gain=1.0) for key in configs}
    size = sum(weight.nbytes for weight in first.values())
    count = layers or max(4, timer.copies(size))
    x = torch.randn(m, model.hidden, device=device).to(configs["q"].torch_A_dtype)

    checked = {0: first}
    linears: list[dict[str, Linear]] = []
    for i in range(count):
        weights = first
        if i:
            weights = {
                key: draw_weight(configs[key], operators[key], device, gain=1.0) for key in configs
            }
        linears.append({key: _our_linear(operators[key], weights[key]) for key in configs})
        if i == count - 1:
            checked[i] = weights
    ours = _layers(model, x, linears)
    prepared = [timer.prepare([partial(_run_all, ours)])]

    dtype = dense_dtype(x.dtype, device)
    dense = [
        {key: _dense_linear(config, dtype, device) for key, config in configs.items()}
        for _ in range(max(2, count // 2))
    ]
    dense_layers = _layers(model, x.to(dtype), dense)
    prepared.append(timer.prepare([partial(_run_all, dense_layers)]))
    us, dense_us = timer.medians(prepared)
    for layer in ours:
        for out in layer.out.values():
            out.copy_(poisoned(out.shape, out.dtype, device))
    timer.run(prepared[0])
    error = _error(ours, checked)
    allowed = max(tolerance(config) for config in configs.values())
    if not error <= allowed:
        raise WrongResultError(f"chain {name}: relative error {error:.1e}, allowed {allowed:.0e}")
    read_us = sum(timer.read(weight.nbytes) for weight in first.values())
    return ChainRow(
        name, W_dtype, A_dtype, m, count, us / count, dense_us / len(dense), read_us, error
    )


def _our_linear(operator: Matmul, weight: Weight) -> Linear:
    return lambda x, out: operator(x, weight.packed, output=out, **weight.extras)


def _dense_linear(config: MatmulConfig, dtype: torch.dtype, device: torch.device) -> Linear:
    weight = (torch.randn(config.N, config.K, device=device) / config.K**0.5).to(dtype)
    return lambda x, out: torch.mm(x, weight.T, out=out)

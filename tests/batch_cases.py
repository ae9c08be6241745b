"""Products of the batch family with tiles of one's own: what its GPU tests draw.

product = BatchProduct(draw(config, m, seed, "cuda"))
product.check(product(tile))
"""

from __future__ import annotations

import random
from dataclasses import replace

from compat import make_config
from decode_cases import COMBINATIONS, DTYPES, Product, Repeated
from problems import draw

from bitblas.config import MatmulConfig
from bitblas.formats import FORMATS, Table
from bitblas.kernels import batch
from bitblas.kernels.batch import Tile
from bitblas.layouts import FRAGMENT_16

__all__ = ["COMBINATIONS", "DTYPES", "BatchProduct", "Repeated", "drawn", "drawn_config"]


class BatchProduct(Product):
    family = batch


def drawn_config(rng: random.Random, a: str, w: str, zeros: str | None) -> MatmulConfig:
    """Any product of the combination that the family serves, of odd sizes mostly."""
    fmt = FORMATS[w]
    group = fmt.fixed_group_size or rng.choice((32, 64, 128, 256, -1))
    if fmt.bits in (1, 3) and group == 32:
        group = 64
    if group == -1:
        k = 8 * rng.choice((1, 2, 9, 70, 131, 520))
    else:
        k = group * rng.choice([n for n in (1, 2, 3, 5, 9, 17, 33) if n * group <= 4352])
    # entries of tables are rounded: a few sums of them may cancel to less than the error
    n = rng.choice((64, 200, 1003) if isinstance(fmt.decoder, Table) else (1, 17, 64, 200, 1003))
    config = make_config(
        a, w, zeros, N=n, K=k, group_size=group, with_scaling=rng.random() < 0.75,
        with_bias=rng.random() < 0.5,
    )  # fmt: skip
    outs = [replace(config, out_dtype=out) for out in ("float16", "bfloat16", "float32")]
    if fmt.bits == 8 and not config.with_scaling and k > 1024:
        outs = outs[1:]  # sums beyond the largest float16
    served = [config for config in outs if batch.serves(config, 17, 90)]
    assert served, f"not served: {config}"
    return rng.choice(served)


def drawn_tile(rng: random.Random, config: MatmulConfig) -> Tile:
    """Any tile that fits, with any number of blocks."""
    smallest = FRAGMENT_16.block_k(config.bits)
    while True:
        if rng.random() < 0.4:
            block_m, along_k = rng.choice([(8, 4), (16, 4), (32, 4), (64, 4), (64, 2)])
            tile = Tile(
                block_m, 1, consumers=4, stage_k=smallest * along_k * rng.choice((1, 2)),
                stages=rng.choice((2, 3, 5)), unroll=1, blocks=rng.choice((1, 3, 11, 70, 132)),
                share=rng.random() < 0.7, along_k=along_k,
            )  # fmt: skip
            if batch.shared_bytes(config, tile) <= batch.SHARED_BYTES:
                return tile
            continue
        block_m, bands = rng.choice(
            [(32, 2), (64, 2), *((rows, 1) for rows in (32, 64, 96, 128, 160, 192, 256, 320))]
        )
        tile = Tile(
            block_m,
            bands,
            consumers=2,
            stage_k=smallest * (1 if smallest > 64 else rng.choice((1, 2))),
            stages=rng.choice((2, 3, 5)),
            unroll=rng.choice((1, 2)),
            blocks=rng.choice((1, 3, 11, 70, 132)),
            share=rng.random() < 0.7,
        )
        if batch.shared_bytes(config, tile) <= batch.SHARED_BYTES:
            return tile


def drawn(
    rng: random.Random, a: str, w: str, zeros: str | None, m: int
) -> tuple[BatchProduct, Tile]:
    """A product of m rows of A and a tile for it, both at random, on the GPU."""
    config = drawn_config(rng, a, w, zeros)
    while m * config.N < 32:  # weights are rounded: a few sums of them may cancel to the error
        config = drawn_config(rng, a, w, zeros)
    problem = draw(config, m, rng.randrange(2**31), "cuda")
    return BatchProduct(problem), drawn_tile(rng, config)

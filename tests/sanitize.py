"""Each kernel of the decode and batch families, and the portable ones, once on small operands.

    compute-sanitizer --tool memcheck python tests/sanitize.py
    compute-sanitizer --tool racecheck python tests/sanitize.py

Every operand has an allocation of its own and of exactly its size, so that memcheck sees reads past
its end. The results are compared with float64; the exit status is 1 where one is wrong.
"""

from __future__ import annotations

import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch is imported

import torch
from compat import make_config
from problems import Problem, draw, relative_error, tolerance

from bitblas.kernels import batch, decode, portable
from bitblas.kernels.decode import Tile
from bitblas.kernels.prepared import execute

# format, activation, zeros mode, N, K, group, m, tile; sizes that fill no tile, and ones that do
DECODE = [
    ("uint4", "float16", "original", 72, 416, 32, 1, Tile(8, 2, 64, 1, 2)),
    ("uint4", "float16", "original", 72, 416, 32, 8, Tile(8, 2, 64, 1, 2)),
    ("uint4", "float16", "quantized", 72, 416, 32, 16, Tile(8, 2, 64, 1, 2)),
    ("uint4", "bfloat16", "original", 64, 1024, 128, 5, Tile(8, 1, 64, 2, 4)),
    ("uint4", "float16", "original", 70, 1184, 32, 3, Tile(8, 1, 64, 1, 2, slabs=2)),
    ("uint4", "float16", "original", 70, 1184, 32, 3, Tile(8, 1, 64, 1, 5, slabs=2)),
    ("uint3", "float16", "quantized", 33, 100, -1, 2, Tile(8, 1, 256, 1, 3)),
    ("nf4", "float16", None, 33, 544, 32, 9, Tile(16, 1, 64, 1, 2)),
    ("nvfp4", "bfloat16", None, 17, 272, 16, 1, Tile(8, 1, 64, 1, 2)),
]
BATCH = [  # tiles that are shared among blocks, and ones that are not
    ("uint4", "float16", "original", 72, 416, 32, 40, batch.Tile(64, 1, 2, 64, 3, 2, 3)),
    ("uint4", "float16", "quantized", 200, 416, 32, 300, batch.Tile(128, 1, 2, 64, 3, 1, 4)),
    ("uint3", "bfloat16", "rescale", 33, 520, -1, 17, batch.Tile(32, 2, 2, 256, 2, 1, 2)),
    ("nf4", "float16", None, 300, 544, 32, 20, batch.Tile(32, 1, 4, 64, 3, 2, 9, share=False)),
]
PORTABLE = [  # both kernels
    ("uint4", "float16", "original", 72, 416, 32, 4, "gemv"),
    ("uint4", "float16", "original", 72, 416, 32, 24, "gemm"),
]


def operands(w, a, zeros, n, k, group, m) -> tuple[Problem, torch.Tensor, torch.Tensor]:
    """(problem, packed weight, result to be written), of the layout that both families read."""
    config = make_config(a, w, zeros, N=n, K=k, group_size=group, with_bias=True)
    # drawn on the CPU: fewer kernels to be watched
    problem = draw(config, m, seed=0)
    W = decode.layout(config).pack(problem.codes, config.bits).cuda()
    fields = {name: x.cuda() for name, x in problem.extras().items()}
    on_gpu = Problem(config, problem.A.cuda(), problem.codes, **fields)
    out = torch.empty((m, n), dtype=config.torch_out_dtype, device="cuda")
    return on_gpu, W, out


def wrong(problem: Problem, out: torch.Tensor, note: object) -> bool:
    extras = {name: x.cpu() for name, x in problem.extras().items()}
    expected = Problem(problem.config, problem.A.cpu(), problem.codes, **extras).expected()
    error = relative_error(out.cpu(), expected)
    print(f"{error:.1e}  {note}", flush=True)
    return error > tolerance(problem.config)


def main() -> int:
    failed = 0
    for family, (*case, tile) in [(decode, x) for x in DECODE] + [(batch, x) for x in BATCH]:
        problem, W, out = operands(*case)
        steps = family.launches(problem.config, problem.A, W, out, **problem.extras(), tile=tile)
        execute(steps, out.device)
        torch.cuda.synchronize()
        failed += wrong(problem, out, (*case, tile))
    for *case, kernel in PORTABLE:
        problem, W, out = operands(*case)
        tiles = portable.candidates(problem.config, problem.A.shape[0])
        tile = next(tile for tile in tiles if tile.kernel == kernel)
        execute(
            portable.launches(problem.config, problem.A, W, out, **problem.extras(), tile=tile),
            out.device,
        )
        torch.cuda.synchronize()
        failed += wrong(problem, out, (*case, kernel))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

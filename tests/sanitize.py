"""Each kernel of each family, and the quantiser, once on small operands.

    compute-sanitizer --tool memcheck python tests/sanitize.py
    compute-sanitizer --tool racecheck python tests/sanitize.py batch attention

Families may be named, of quantize, decode, batch, batch8, portable, attention; else it is all.

Every operand has an allocation of its own and of exactly its size, so that memcheck sees reads past
its end. The results are compared with float64; the exit status is 1 where one is wrong.

racecheck reports hazards where there is none, as the PTX memory model has it, in two patterns:

- the byte by which Triton's warp_specialize hands out its partitions, over named barriers (batch
  and batch8, in the lines of `gl.warp_specialize` and of a kernel's first);
- a warpgroup that writes shared memory, meets at a named barrier and has one thread arrive on an
  mbarrier, for which others wait before they read: what that thread wrote is known to be ordered,
  what the others wrote before the named barrier is not (sum_along_k: 2032 of 2048 bytes).
"""

from __future__ import annotations

import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch is imported

import attention_cases
import torch
from compat import make_config
from problems import Problem, draw, relative_error, tolerance

from bitblas import quantize_activation
from bitblas.kernels import attention, batch, batch8, decode, gpu, portable
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
FEW_ROWS = batch.Tile(16, 1, 4, 256, 3, 1, 2, along_k=4)
BATCH = [  # tiles that are shared among blocks, and ones that are not
    ("uint4", "float16", "original", 72, 416, 32, 40, batch.Tile(64, 1, 2, 64, 3, 2, 3)),
    ("uint4", "float16", "quantized", 200, 416, 32, 300, batch.Tile(128, 1, 2, 64, 3, 1, 4)),
    ("int4", "bfloat16", None, 200, 416, 32, 90, batch.Tile(96, 1, 2, 64, 3, 1, 4)),
    ("uint3", "bfloat16", "rescale", 33, 520, -1, 17, batch.Tile(32, 2, 2, 256, 2, 1, 2)),
    ("nf4", "float16", None, 300, 544, 32, 20, batch.Tile(32, 1, 2, 64, 3, 2, 9, share=False)),
    ("uint4", "float16", "original", 72, 4096, 64, 7, batch.Tile(8, 1, 4, 512, 3, 1, 3, along_k=4)),
    ("uint4", "bfloat16", "original", 72, 1024, 64, 16, FEW_ROWS),
    ("int4", "float16", None, 200, 1024, 64, 50, batch.Tile(64, 1, 4, 128, 3, 1, 3, along_k=2)),
    ("uint4", "float16", "quantized", 72, 1024, 64, 12, FEW_ROWS),
    ("nf4", "float16", None, 72, 1024, 64, 16, FEW_ROWS),
    ("nvfp4", "float16", None, 200, 1024, 16, 40, batch.Tile(64, 1, 2, 128, 3, 1, 3)),
]
BATCH8 = [
    ("int4", "int8", None, 72, 416, -1, 5, batch8.Tile(16, 1, 1, 256, 3, 1, 2)),
    ("uint4", "int8", "original", 200, 512, 128, 100, batch8.Tile(64, 2, 2, 128, 3, 1, 2)),
    ("int8", "int8", None, 33, 528, -1, 300, batch8.Tile(128, 1, 2, 128, 2, 2, 3)),
    ("int2", "e4m3_float8", None, 72, 544, -1, 40, batch8.Tile(64, 1, 1, 128, 3, 1, 2)),
]
PORTABLE = [  # both kernels
    ("uint4", "float16", "original", 72, 416, 32, 4, "gemv"),
    ("uint4", "float16", "original", 72, 416, 32, 24, "gemm"),
]

# key heads, queries of each, keys, dim, kinds of K and V, tile; two sequences, one of few keys
ATTENTION = [
    (2, 4, 203, 64, "int4", "int8", attention.Tile(4, 32, 2, 1, 3, "codes")),
    (4, 3, 203, 128, "int8", "int4", attention.Tile(4, 32, 4, 1, 2, "codes")),
    (2, 4, 131, 256, "int4", "int4", attention.Tile(4, 64, 2, 1, 1, "codes")),
    (2, 5, 131, 64, "e4m3_float8", "float16", attention.Tile(8, 16, 4, 1, 3, "few")),
    (1, 9, 131, 128, "int4", "float16", attention.Tile(16, 32, 4, 2, 1, "few")),
    (2, 20, 131, 64, "int8", "int4", attention.Tile(32, 64, 4, 2, 3, "rows", 128)),
    (1, 50, 203, 128, "int4", "e4m3_float8", attention.Tile(64, 64, 4, 4, 2, "rows", 255)),
    (1, 70, 331, 128, "int4", "int4", attention.Tile(128, 128, 8, 8, 1, "rows", 255)),
    (2, 20, 131, 72, "int8", "int4", attention.Tile(32, 64, 4, 2, 2)),
    (2, 70, 131, 64, "float16", "float16", attention.Tile(64, 64, 4, 2)),
]


def operands(w, a, zeros, n, k, group, m) -> tuple[Problem, torch.Tensor, torch.Tensor]:
    """(problem, packed weight, result to be written), of the layout that the families read."""
    config = make_config(a, w, zeros, N=n, K=k, group_size=group, with_bias=True)
    # drawn on the CPU: fewer kernels to be watched
    problem = draw(config, m, seed=0)
    W = portable.layout(config).pack(problem.codes, config.bits).cuda()
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


def quantiser_is_wrong(m: int, k: int) -> bool:
    x = torch.randn(m, k).half()
    q = torch.empty((m, k), dtype=torch.int8, device="cuda")
    scale = torch.empty(m, device="cuda")
    gpu.quantize_activation(x.cuda(), q, scale, "int8")
    expected_q, expected_scale = quantize_activation(x)
    same = torch.equal(q.cpu(), expected_q) and torch.equal(scale.cpu(), expected_scale)
    print("quantiser", m, k, "right" if same else "wrong", flush=True)
    return not same


def attention_is_wrong(kv_heads, rows, k_len, dim, k, v, tile) -> bool:
    problem = attention_cases.draw(
        2, 1, kv_heads * rows, kv_heads, k_len, dim, caches=(k, v), lengths=[k_len, 7]
    )
    given = {name: moved(x) for name, x in problem.extras.items()}
    lengths = given.pop("kv_len")
    operands = attention.Operands(*map(moved, problem.tensors), **given, lengths=lengths)
    out = torch.empty_like(operands.Q)
    major, minor = torch.cuda.get_device_capability()
    execute(attention.launches(operands, out, False, tile, 10 * major + minor), out.device)
    torch.cuda.synchronize()
    error = relative_error(out.cpu(), problem.expected())
    print(f"{error:.1e}  attention {kv_heads} x {rows}, {k_len} keys, {k} {v} {tile}", flush=True)
    return error > attention_cases.TOLERANCE["float16"]


def moved(x: torch.Tensor) -> torch.Tensor:
    """On the GPU, with the strides that scales of a cache have."""
    storage = torch.empty(0, dtype=x.dtype, device="cuda").set_(x.untyped_storage().cuda())
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def main() -> int:
    wanted = sys.argv[1:] or ["quantize", "decode", "batch", "batch8", "portable", "attention"]
    failed = 0
    if "quantize" in wanted:
        failed += sum(quantiser_is_wrong(m, k) for m, k in ((3, 100), (2050, 7), (2, 33000)))
    families = {"decode": (decode, DECODE), "batch": (batch, BATCH), "batch8": (batch8, BATCH8)}
    for name in families.keys() & set(wanted):
        family, cases = families[name]
        for *case, tile in cases:
            problem, W, out = operands(*case)
            steps = family.launches(
                problem.config, problem.A, W, out, **problem.extras(), tile=tile
            )
            execute(steps, out.device)
            torch.cuda.synchronize()
            failed += wrong(problem, out, (*case, tile))
    for *case, kernel in PORTABLE if "portable" in wanted else []:
        problem, W, out = operands(*case)
        tiles = portable.candidates(problem.config, problem.A.shape[0])
        tile = next(tile for tile in tiles if tile.kernel == kernel)
        execute(
            portable.launches(problem.config, problem.A, W, out, **problem.extras(), tile=tile),
            out.device,
        )
        torch.cuda.synchronize()
        failed += wrong(problem, out, (*case, kernel))
    if "attention" in wanted:
        failed += sum(attention_is_wrong(*case) for case in ATTENTION)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

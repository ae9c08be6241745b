"""A Gluon kernel that reads a tile of a matrix by TMA, as a launch."""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def"

import torch

from bitblas.kernels.launch import Launch
from bitblas.kernels.versions import TensorDescriptor, gl, gluon, mbarrier, tma_load

ROWS, COLUMNS = 16, 64


@gluon.jit
def read_tile(SOURCE, OUT, ROW, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """OUT (ROWS, COLUMNS) = the tile of SOURCE that starts at ROW."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    shared = gl.allocate_shared_memory(gl.float16, [ROWS, COLUMNS], SOURCE.layout)
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    mbarrier.expect(barrier, SOURCE.block_type.nbytes)
    tma_load(SOURCE, [ROW, 0], barrier, shared)
    mbarrier.wait(barrier, 0)
    mbarrier.invalidate(barrier)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    gl.store(OUT + rows[:, None] * COLUMNS + columns[None, :], shared.load(layout))


def read_tile_launch(source: torch.Tensor, out: torch.Tensor, row: int) -> Launch:
    layout = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], gl.float16)
    descriptor = TensorDescriptor.from_tensor(source, [ROWS, COLUMNS], layout)
    arguments = {"SOURCE": descriptor, "OUT": out, "ROW": row}
    return Launch(read_tile, (1,), arguments, {"ROWS": ROWS, "COLUMNS": COLUMNS}, 4, 1)

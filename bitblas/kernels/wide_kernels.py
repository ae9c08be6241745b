"""Prototype: decode by wgmma, 4 warpgroups along K."""
# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

from .device import decode_scale, keep_loads_here, let_next_kernel_start, powers, take, wait_for_previous_kernel
from .versions import (
    async_copy, copy_async, fence_async_shared, gl, gluon, mma_v2, reinterpret, thread_barrier,
    warpgroup_mma, warpgroup_mma_wait,
)


@gluon.constexpr_function
def loaded_layout(BANDS):
    registers = [[0, 0, 0, 1], [0, 0, 0, 2]] + powers(BANDS, 4, 0)
    lanes = [[0, 0, 0, 4 << i] for i in range(5)]
    return gl.DistributedLinearLayout(registers, lanes, powers(4, 4, 2) + powers(4, 4, 1), [], [BANDS, 4, 4, 128])


@gluon.constexpr_function
def words_layout(BANDS):
    registers = powers(4, 5, 4) + [[16 << i, 0, 0, 0, 0] for i in range(5) if 1 << i < BANDS]
    return gl.DistributedLinearLayout(registers, powers(4, 5, 2) + powers(8, 5, 1), powers(16, 5, 0), [], [16 * BANDS, 8, 4, 1, 4])


@gluon.constexpr_function
def groups_layout(BANDS, COUNT):
    registers = powers(COUNT, 6, 5) + [[0, 0, 0, 1, 0, 0]] + powers(BANDS, 6, 0)
    lanes = [[0] * 6, [0] * 6] + powers(8, 6, 4)
    return gl.DistributedLinearLayout(registers, lanes, powers(4, 6, 2) + powers(4, 6, 1), [], [BANDS, 4, 4, 2, 8, COUNT])


@gluon.constexpr_function
def result_layout(BANDS, COLS):
    registers = [[0, 64], [0, 128], [0, 32]] + [[0, 256 << i] for i in range(5) if 1 << i < BANDS]
    warps = powers(COLS, 2, 0)
    if COLS == 8:
        registers, warps = [[0, 64], [0, 128]] + registers[3:], warps + [[0, 32]]
    return gl.DistributedLinearLayout(registers, powers(32, 2, 1), warps, [], [COLS, 256 * BANDS])


@gluon.jit
def warpgroup():
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 7; }", "=r", [], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def words_pointer(W, tile, slab, chunks, DEPTH: gl.constexpr, BANDS: gl.constexpr):
    L: gl.constexpr = loaded_layout(BANDS)
    L3: gl.constexpr = gl.SliceLayout(3, L)
    L2: gl.constexpr = gl.SliceLayout(2, L3)
    b = gl.arange(0, BANDS, gl.SliceLayout(1, L2)).expand_dims(1).expand_dims(2).expand_dims(3)
    p = gl.arange(0, 4, gl.SliceLayout(0, L2)).expand_dims(0).expand_dims(2).expand_dims(3)
    w = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L3))).expand_dims(0).expand_dims(1).expand_dims(3)
    x = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L)))).expand_dims(0).expand_dims(1).expand_dims(2)
    start = W + (tile * BANDS * chunks + slab * (4 * DEPTH)).to(gl.int64) * 512
    return start + (b * (chunks * 512) + p * (DEPTH * 512) + w * 128 + x)


@gluon.jit
def load_words(pointer, d: gl.constexpr, valid, old):
    return gl.load(pointer + d * 512, mask=valid & (gl.full(pointer.shape, 1, gl.int1, pointer.type.layout)), other=old, eviction_policy="evict_first")


@gluon.jit
def load_groups(POINTER, tile, slab, G, valid, COUNT: gl.constexpr, BANDS: gl.constexpr):
    L: gl.constexpr = groups_layout(BANDS, COUNT)
    L5: gl.constexpr = gl.SliceLayout(5, L)
    L4: gl.constexpr = gl.SliceLayout(4, L5)
    L3: gl.constexpr = gl.SliceLayout(3, L4)
    b = gl.arange(0, BANDS, gl.SliceLayout(1, gl.SliceLayout(2, L3)))
    p = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, L3)))
    w = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L3)))
    r = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L4))))
    g = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L5)))))
    j = gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, L))))))
    row = (b.expand_dims(1).expand_dims(2).expand_dims(3).expand_dims(4).expand_dims(5) * 64
           + w.expand_dims(0).expand_dims(1).expand_dims(3).expand_dims(4).expand_dims(5) * 16
           + r.expand_dims(0).expand_dims(1).expand_dims(2).expand_dims(4).expand_dims(5) * 8
           + g.expand_dims(0).expand_dims(1).expand_dims(2).expand_dims(3).expand_dims(5))
    col = (p.expand_dims(0).expand_dims(2).expand_dims(3).expand_dims(4).expand_dims(5) * COUNT
           + j.expand_dims(0).expand_dims(1).expand_dims(2).expand_dims(3).expand_dims(4))
    G = G // COUNT * COUNT
    start = POINTER + (tile * (64 * BANDS)).to(gl.int64) * G + slab * (4 * COUNT)
    mask = valid & gl.full([BANDS, 4, 4, 2, 8, COUNT], 1, gl.int1, L)
    return gl.load(start + (row * G + col), mask=mask, other=0)


@gluon.jit
def stage(A, target, slab, M, K, DEPTH: gl.constexpr, COLS: gl.constexpr, valid):
    L: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [64 // COLS, COLS // 4, 1], [2, 1, 0])
    c = gl.arange(0, 4 * DEPTH, gl.SliceLayout(1, gl.SliceLayout(2, L))).expand_dims(1).expand_dims(2)
    m = gl.arange(0, COLS, gl.SliceLayout(0, gl.SliceLayout(2, L))).expand_dims(0).expand_dims(2)
    k = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, L))).expand_dims(0).expand_dims(1)
    K = K // 8 * 8
    HALF: gl.constexpr = 2 * DEPTH  # boxes: first halves of all groups, then second ones
    pointer = A + slab * (4 * DEPTH * 64) + (m * K + (c % HALF * 2 + c // HALF) * 64 + k)
    mask = (valid & (m < M)) & gl.full([4 * DEPTH, COLS, 64], 1, gl.int1, L)
    copy_async(target, pointer, mask=mask)
    async_copy.commit_group()


@gluon.jit
def step_registers(o, STEP: gl.constexpr, PAIRS: gl.constexpr):
    a = gl.join(gl.join(o[4 * STEP], o[4 * STEP + 1]), gl.join(o[4 * STEP + 2], o[4 * STEP + 3]))
    return a.reshape([a.shape[0], 8, 4, PAIRS, 2, 2, 2])


@gluon.jit
def row_operand(words, ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, BANDS: gl.constexpr, DOT: gl.constexpr):
    L: gl.constexpr = words_layout(BANDS)
    w = gl.convert_layout(words.reshape([16 * BANDS, 8, 4, 1, 4]), L, assert_trivial=True)
    o = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [w], dtype=(gl.float16,) * 8, is_pure=True, pack=2)
    a = step_registers(o, 0, 2)
    a = gl.join(a, step_registers(o, 1, 2))
    a = a.permute([0, 5, 1, 3, 7, 6, 2, 4])
    return gl.convert_layout(a.reshape([256 * BANDS, 64]), DOT, assert_trivial=True)


@gluon.jit
def group_rows(x, j: gl.constexpr, BANDS: gl.constexpr, MMA: gl.constexpr):
    x = take(x, j).reshape([256 * BANDS])
    return gl.convert_layout(x, gl.SliceLayout(1, MMA), assert_trivial=True)


@gluon.jit
def by_half(LOW: gl.constexpr, HIGH: gl.constexpr, ROWS: gl.constexpr, L: gl.constexpr):
    row = gl.arange(0, ROWS, L)
    return gl.where((row // 8) % 2 == 0, LOW, HIGH)


@gluon.jit
def fold(acc, part, totals_smem, group, scales, zeros, j: gl.constexpr, ZERO: gl.constexpr, SHIFT: gl.constexpr, BANDS: gl.constexpr, MMA: gl.constexpr):
    SL: gl.constexpr = gl.SliceLayout(1, MMA)
    scale = group_rows(scales, j, BANDS, MMA).to(gl.float32)
    zero = group_rows(zeros, j, BANDS, MMA).to(gl.float32)
    offset = zero * by_half(ZERO[0], ZERO[1], 256 * BANDS, SL) - by_half(SHIFT[0], SHIFT[1], 256 * BANDS, SL)
    offset = offset * scale
    sums = totals_smem.index(group * 8).load(gl.SliceLayout(0, MMA)).expand_dims(0)
    acc = gl.fma(part, gl.broadcast(scale.expand_dims(1), part)[0], acc)
    offset, acc = gl.broadcast(offset.expand_dims(1), acc)
    sums, acc = gl.broadcast(sums, acc)
    return gl.fma(sums, offset, acc)


@gluon.jit(do_not_specialize=["M", "N", "K", "G", "EARLY"])
def wide_kernel(
    A, W, OUT, SCALE, ZEROS, M, N, K, G, EARLY,
    ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, UNIT: gl.constexpr, ZERO: gl.constexpr, SHIFT: gl.constexpr,
    BANDS: gl.constexpr, DEPTH: gl.constexpr, BUFFERS: gl.constexpr, COLS: gl.constexpr, WITH_SUMS: gl.constexpr,
):
    ROWS: gl.constexpr = 64 * BANDS
    COUNT: gl.constexpr = DEPTH // 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[16, 1], instr_shape=[16, COLS, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    SOLID: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    a_smem = gl.allocate_shared_memory(gl.float16, [BUFFERS, 4 * DEPTH, COLS, 64], SOLID)
    boxes = reinterpret(a_smem, gl.float16, [BUFFERS * 4 * DEPTH, COLS, 64], FLAT)
    totals_smem = gl.allocate_shared_memory(gl.float32, [4 * COUNT, 8, COLS], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    totals = reinterpret(totals_smem, gl.float32, [4 * COUNT * 8, COLS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    sum_smem = gl.allocate_shared_memory(gl.float32, [COLS, 256 * BANDS], gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))
    if EARLY == 0:
        wait_for_previous_kernel()
    let_next_kernel_start()
    chunks = K // 64
    slabs = K // (256 * DEPTH)
    tiles = N // ROWS
    tile = gl.program_id(0)
    pointer = words_pointer(W, tile, 0, chunks, DEPTH, BANDS)
    ring = ()
    for d in gl.static_range(DEPTH):
        ring = ring + (load_words(pointer, d, True, 0),)
    keep_loads_here()
    scale = load_groups(SCALE, tile, 0, G, True, COUNT, BANDS)
    zero = load_groups(ZEROS, tile, 0, G, True, COUNT, BANDS)
    wait_for_previous_kernel()
    count = (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0) * slabs
    for i in gl.static_range(BUFFERS - 1):
        stage(A, a_smem.index(i), i % slabs, M, K, DEPTH, COLS, i < count)
    acc = gl.zeros([256 * BANDS, COLS], gl.float32, MMA)
    slab = 0
    buffer = 0
    me = warpgroup()
    for step in range(count):
        async_copy.wait_group(BUFFERS - 2)
        fence_async_shared()
        thread_barrier()
        ahead = (step + BUFFERS - 1) % slabs
        other = gl.where(buffer == 0, BUFFERS - 1, buffer - 1)
        stage(A, a_smem.index(other), ahead, M, K, DEPTH, COLS, step + BUFFERS - 1 < count)
        if WITH_SUMS:
            SM: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[16, 1, 1], instr_shape=[1, 16, 8])
            ones = gl.full([4 * DEPTH, 16, 64], 1.0, gl.float16, gl.DotOperandLayout(0, SM, 2))
            b = a_smem.index(buffer).permute((0, 2, 1)).load(gl.DotOperandLayout(1, SM, 2))
            s = mma_v2(ones, b, gl.zeros([4 * DEPTH, 16, COLS], gl.float32, SM))
            s = gl.sum(s.reshape([2, 4 * COUNT, 16, COLS]), axis=0)
            totals_smem.store(take(s.reshape([4 * COUNT, 2, 8, COLS]).permute([0, 2, 3, 1]), 0))
        last = slab + 1 == slabs
        next_tile = gl.where(last, tile + gl.num_programs(0), tile)
        next_slab = gl.where(last, 0, slab + 1)
        more = step + 1 < count
        scales = scale
        zeros = zero
        pointer = words_pointer(W, next_tile, next_slab, chunks, DEPTH, BANDS)
        box = buffer * (4 * DEPTH) + me * COUNT
        refilled = ()
        parts = (gl.zeros([256 * BANDS, COLS], gl.float32, MMA), gl.zeros([256 * BANDS, COLS], gl.float32, MMA))
        for d in gl.static_range(DEPTH):
            a = row_operand(ring[d], ASM, CONSTRAINTS, BANDS, DOT)
            refilled = refilled + (load_words(pointer, d, more, ring[d]),)
            keep_loads_here()
            part = warpgroup_mma(a, boxes.index(box + (d // 2 + d % 2 * (2 * DEPTH))).permute((1, 0)), parts[(d // 2) % 2], use_acc=d % 2 == 1, is_async=True)
            if d == DEPTH // 2:
                scale = load_groups(SCALE, next_tile, next_slab, G, more, COUNT, BANDS)
                zero = load_groups(ZEROS, next_tile, next_slab, G, more, COUNT, BANDS)
            if d % 2 == 0 and d > 0:
                part, done = warpgroup_mma_wait(1, deps=(part, parts[((d // 2) + 1) % 2]))
                acc = fold(acc, done, totals, me * COUNT + ((d // 2) - 1), scales, zeros, (d // 2) - 1, ZERO, SHIFT, BANDS, MMA)
            if d == DEPTH - 1:
                part = warpgroup_mma_wait(0, deps=(part,))
                acc = fold(acc, part, totals, me * COUNT + (d // 2), scales, zeros, (d // 2), ZERO, SHIFT, BANDS, MMA)
            if (d // 2) % 2 == 0:
                parts = (part, parts[1])
            else:
                parts = (parts[0], part)
        ring = refilled
        buffer = gl.where(buffer + 1 == BUFFERS, 0, buffer + 1)
        if last:
            acc = acc * by_half(UNIT[0], UNIT[1], 256 * BANDS, gl.SliceLayout(1, MMA)).expand_dims(1)
            sum_smem.permute((1, 0)).store(acc)
            result = gl.sum(sum_smem.load(result_layout(BANDS, COLS)).reshape([COLS, BANDS, 4, 64]), axis=2)
            O: gl.constexpr = result.type.layout
            mm = gl.arange(0, COLS, gl.SliceLayout(1, gl.SliceLayout(2, O))).expand_dims(1).expand_dims(2)
            bb = gl.arange(0, BANDS, gl.SliceLayout(0, gl.SliceLayout(2, O))).expand_dims(0).expand_dims(2)
            xx = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, O))).expand_dims(0).expand_dims(1)
            gl.store(OUT + (mm * N + tile * ROWS + bb * 64 + xx), result.to(OUT.dtype.element_ty), mask=(mm < M) & (bb + xx >= 0))
            acc = gl.zeros([256 * BANDS, COLS], gl.float32, MMA)
        slab = next_slab
        tile = next_tile
    async_copy.wait_group(0)

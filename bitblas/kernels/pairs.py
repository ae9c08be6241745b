"""Device code by which the two blocks of a cluster add their sums, through distributed shared
memory.

Two barriers of a block's own (launch.Launch.extra_shared bytes at the end of its shared memory):
ROOM, completed when both of the other block's consumers are done with its first shared memory,
which is sent to; ARRIVED, when all bytes have come. Both serve once.
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from .versions import gl, gluon

EXTRA_SHARED = 16  # bytes
_BARRIERS = (  # `end`: the end of all shared memory
    ".reg .b32 end, size; mov.b32 end, global_smem; mov.b32 size, %dynamic_smem_size;"
    "add.u32 end, end, size;"
)


@gluon.constexpr_function
def _scope(code):
    return "{" + code + "}"


@gluon.constexpr_function
def _with_barriers(code):
    return "{" + _BARRIERS + code + " mov.b32 $0, 0;}"


@gluon.constexpr_function
def _until_complete(offset):
    return (
        ".reg .pred p; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, "
        f"[end + {offset}], 0; @!p bra again;"
    )


# by one thread of a warpgroup: `@p`
_ELECTED = (
    ".reg .pred p; .reg .b32 t; mov.b32 t, %tid.x; and.b32 t, t, 127; setp.eq.u32 p, t, 0;"
)


@gluon.jit
def _run(CODE: gl.constexpr):
    gl.inline_asm_elementwise(
        _with_barriers(CODE), "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.constexpr_function
def _beginning(count):
    return (
        _ELECTED + "@p mbarrier.init.shared::cta.b64 [end + -16], 2;"
        "@p mbarrier.init.shared::cta.b64 [end + -8], 1; @p fence.mbarrier_init.release.cluster;"
        f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [end + -8], {count};"
    )


@gluon.jit
def begin_pair(BYTES: gl.constexpr):
    """By the block's first warps: its barriers, of which ARRIVED expects so many bytes."""
    _run(_beginning(BYTES))


@gluon.jit
def join_pair():
    """By every warp of both blocks, once, before one of them calls wait_for_pair."""
    _run("barrier.cluster.arrive.release;")


@gluon.jit
def wait_for_pair():
    """Until both blocks have begun."""
    _run("barrier.cluster.wait.acquire;")


@gluon.jit
def _of_other_block(rank):
    """Where the other block's shared memory lies, as ours begins at global_smem."""
    return gl.inline_asm_elementwise(
        _scope(".reg .b32 a; mov.b32 a, global_smem; mapa.shared::cluster.u32 $0, a, $1;"),
        "=r,r", [1 - rank], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _giving_room():
    return _scope(
        ".reg .b32 size, a; mov.b32 size, %dynamic_smem_size; add.u32 a, $1, size;"
        + _ELECTED
        + "@p mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a + -16]; mov.b32 $0, 0;"
    )


@gluon.jit
def give_room(rank):
    """By a consumer that reads no more of what the other block may send to. Its warps have to be
    together."""
    gl.inline_asm_elementwise(
        _giving_room(), "=r,r", [_of_other_block(rank)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_for_room():
    _run(_until_complete(-16))


@gluon.jit
def wait_for_arrival():
    _run(_until_complete(-8))


@gluon.constexpr_function
def _sending():
    return _scope(
        ".reg .b32 size, b; mov.b32 size, %dynamic_smem_size; add.u32 b, $6, size;"
        "add.u32 b, b, -8;"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"
        " [$5], {$1, $2, $3, $4}, [b]; mov.b32 $0, 0;"
    )


@gluon.jit
def _fours(x):
    """The elements 4 i + 0, .. 3 of x, which lie in one thread."""
    even, odd = gl.split(x.reshape([x.numel // 4, 2, 2]))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return a, b, c, d


@gluon.jit
def send(x, rank, FIRST: gl.constexpr):
    """Has x, of which a thread's elements lie in fours, sent to the other block's shared memory,
    from byte FIRST on."""
    a, b, c, d = _fours(x)
    there = _of_other_block(rank)
    where = there + FIRST + 16 * gl.arange(0, x.numel // 4, a.type.layout)
    gl.inline_asm_elementwise(
        _sending(), "=r,f,f,f,f,r,r", [a, b, c, d, where, there], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _receiving():
    return _scope(
        ".reg .b32 a; mov.b32 a, global_smem; add.u32 a, a, $4;"
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [a];"
    )


@gluon.jit
def received(x, FIRST: gl.constexpr):
    """x plus what the other block sent of the same shape, from byte FIRST on."""
    a, b, c, d = _fours(x)
    where = FIRST + 16 * gl.arange(0, x.numel // 4, a.type.layout)
    e, f, g, h = gl.inline_asm_elementwise(
        _receiving(), "=f,=f,=f,=f,r", [where], dtype=(gl.float32,) * 4, is_pure=False, pack=1,
    )  # fmt: skip
    return gl.join(gl.join(a + e, c + g), gl.join(b + f, d + h)).reshape([x.numel])

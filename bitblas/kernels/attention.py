"""Launcher of the attention kernels: 16-bit and quantised caches on every GPU from sm_80 up.

`tile_for` says how a problem is cut, `launches` what to start, `run` starts it. Keys come as
[batch, tokens, heads, dim] whatever their layout in memory, which the strides tell. `expand` makes
16-bit ones, contiguous along dim, of any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch

from . import attention_kernels as kernels
from . import versions
from .compile import Source
from .launch import PROGRAMMATIC_LAUNCH, Launch, Varying, Workspace
from .prepared import Prepared, architecture, current_device, execute

_MOST_SPLITS = 128
_KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}
_MOST_KEPT = 4096  # prepared calls
# Of attend_few for each kind, the narrowest first: keys of a warp in a step, warps, registers,
# stages (2: scores a step ahead).
_FEW = {
    "int4": (32, 4, 168, 2),
    "int8": (32, 4, 168, 1),
    "e4m3": (16, 8, 128, 1),
    "dense": (16, 8, 255, 1),
}


@dataclass(frozen=True)
class Tile:
    """What a block computes: block_m rows, block_n keys at a time, of one of `splits` parts."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: int = 1
    kernel: str = "many"  # or "rows", "few", "codes"
    registers: int = 0  # of a thread, at most; 0: what the compiler takes


class Operands(NamedTuple):
    """Checked operands of a call. K, V: int4 codes have dim / 2 bytes. scales, zeros: [batch,
    tokens, heads], with equal strides for scale and zeros. lengths: [batch] int32 or int64."""

    Q: torch.Tensor
    K: torch.Tensor
    V: torch.Tensor
    k_scale: torch.Tensor | None = None
    k_zeros: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    v_zeros: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


def launches(
    operands: Operands,
    out: torch.Tensor,
    causal: bool,
    tile: Tile,
    arch: int,
    k_len: int | Varying | None = None,
) -> list[Launch]:
    """out [batch, q_len, heads, dim] = softmax(Q K^T / sqrt(dim)) V."""
    Q, K, V, k_scale, k_zeros, v_scale, v_zeros, lengths = operands
    batch, q_len, heads, dim = Q.shape
    kv_heads = V.shape[2]
    group = heads // kv_heads
    tiles = -(-group * q_len // tile.block_m)
    units = {name: _unit(x) for name, x in (("Q", Q), ("K", K), ("V", V))}
    dim_major = K.stride(3) == 1
    parts, lse = out, None
    if tile.splits > 1:
        parts = Workspace((tile.splits, batch, q_len, heads, dim), torch.float32)  # type: ignore[assignment]
        lse = Workspace((tile.splits, batch, q_len, heads), torch.float32)
        rows = batch * q_len * heads
        o_strides: Sequence[int] = (rows * dim, q_len * heads * dim, heads * dim, dim)
    else:
        o_strides = (0, *_strides(out)[:3])
    q_strides, k_strides, v_strides = (
        [stride // units[name] for stride in _strides(x)]
        for name, x in (("Q", Q), ("K", K), ("V", V))
    )
    arguments: dict[str, Any] = {
        "Q": Q, "K": _bytes(K), "V": _bytes(V), "OUT": parts,
        "K_SCALE": k_scale, "K_ZEROS": k_zeros, "V_SCALE": v_scale, "V_ZEROS": v_zeros,
        "LENGTHS": lengths, "LSE": lse,
        "q_len": q_len, "k_len": K.shape[1] if k_len is None else k_len,
        "tiles": tiles, "splits": tile.splits,
        **dict(zip(("q_batch", "q_token", "q_head"), q_strides)),
        **dict(zip(("k_batch", "k_token", "k_head", "k_dim"), k_strides)),
        **dict(zip(("v_batch", "v_token", "v_head"), v_strides)),
        **dict(zip(("ks_batch", "ks_token", "ks_head"), _strides(k_scale))),
        **dict(zip(("vs_batch", "vs_token", "vs_head"), _strides(v_scale))),
        **dict(zip(("o_split", "o_batch", "o_token", "o_head"), o_strides)),
    }  # fmt: skip
    padded = max(32, 1 << (dim - 1).bit_length())
    pdl = PROGRAMMATIC_LAUNCH and tile.splits > 1 and arch >= 90
    quantised = k_scale is not None or v_scale is not None  # two loops would not fit registers
    constants = {
        "SCALE": math.log2(math.e) / math.sqrt(dim), "GROUP": group, "KV_HEADS": kv_heads,
        "DIM": dim, "D": padded, "CAUSAL": causal,
        "K_KIND": kind_of(K, Q), "V_KIND": kind_of(V, Q),
        "UNIT_Q": units["Q"], "UNIT_K": units["K"], "UNIT_V": units["V"],
        "K_DIM_MAJOR": dim_major, "SPLIT": tile.splits > 1,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "PEEL": tile.block_m > 16 and not quantised, "NATIVE_FP8": arch >= 89, "PDL": pdl,
    }  # fmt: skip
    grid = (tiles, kv_heads, batch * tile.splits)
    if tile.kernel != "many":
        steps = [_words_launch(operands, arguments, constants, causal, tile, grid)]
    else:
        steps = [
            Launch(kernels.attend, grid, arguments, constants, tile.num_warps, tile.num_stages)
        ]
    if tile.splits > 1:
        combined = {
            "PARTS": parts, "LSE": lse, "OUT": out, "rows": rows, "q_len": q_len,
            "splits": tile.splits,
            **dict(zip(("o_batch", "o_token", "o_head"), _strides(out))),
        }  # fmt: skip
        constants = {
            "HEADS": heads, "DIM": dim, "D": padded, "CHUNK": min(32, 4096 // padded),
            "PDL": pdl,
        }  # fmt: skip
        options = {"launch_pdl": True} if pdl else {}
        steps.append(Launch(kernels.combine, (rows,), combined, constants, 4, 1, options))
    return steps


def _words_launch(
    operands: Operands, arguments: dict[str, Any], constants: dict[str, Any], causal: bool,
    tile: Tile, grid: tuple[int, ...],
) -> Launch:  # fmt: skip
    """attend_rows, attend_few or attend_codes in place of attend: words for elements, the stride of
    tokens known; attend_rows has TMA maps of the codes."""
    from . import attention_codes_kernels as codes_kernels
    from . import attention_decode_kernels as decode_kernels
    from . import attention_rows_kernels as rows_kernels

    Q = operands.Q
    arguments = dict(arguments)
    for name in ("ks_batch", "ks_head", "vs_batch", "vs_head"):
        arguments[name] //= 4
    token_strides = {"K_TOKEN": arguments["k_token"] * 4, "V_TOKEN": arguments["v_token"] * 4}
    for name in ("k_token", "k_dim", "v_token", "ks_token", "vs_token"):
        del arguments[name]
    kept = ("SCALE", "GROUP", "KV_HEADS", "DIM", "K_KIND", "V_KIND", "SPLIT", "PDL")
    constants = {name: constants[name] for name in kept} | token_strides | {
        "ROW_LIMITS": causal and Q.shape[1] > 1, "BF16": Q.dtype == torch.bfloat16,
    }  # fmt: skip
    shape = {"KEYS": tile.block_n, "WARPS": tile.num_warps}
    if tile.kernel == "codes":
        function = codes_kernels.attend_codes
    elif tile.kernel == "rows":
        if tile.num_stages < 2:
            raise ValueError(f"num_stages of rows: got {tile.num_stages}, expected 2 or more")
        function = rows_kernels.attend_rows
        shape = {"ROWS": tile.block_m, "WARPS": tile.num_warps, "STAGES": tile.num_stages}
        for name in ("K", "V"):
            arguments[name] = _codes_map(arguments[name], arguments["k_len"], tile.block_n)
            del constants[f"{name}_TOKEN"]
            for stride in ("batch", "head"):
                del arguments[f"{name.lower()}_{stride}"]
    else:
        function = decode_kernels.attend_few
        shape |= {"HALVES": tile.block_m // 8, "AHEAD": tile.num_stages > 1}
    options = {"maxnreg": tile.registers} if tile.registers else {}
    return Launch(function, grid, arguments, constants | shape, tile.num_warps, 1, options)


def _codes_map(codes: torch.Tensor, tokens: int | Varying, count: int) -> Any:
    """The map by which `count` tokens of a head are copied at a time; there are so many of them."""
    from .versions import TensorDescriptor, gl

    width = codes.shape[3]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8, rank=4)
    strides = [s if n > 1 else width for n, s in zip(codes.shape, codes.stride())]
    strides[3] = 1
    found = TensorDescriptor(codes, list(codes.shape), strides, [1, count, 1, width], layout)
    found.shape[1] = tokens
    return found


def expand_launch(
    x: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    zeros: torch.Tensor | None,
    arch: int,
    length: int | Varying | None = None,
) -> Launch:
    """out [batch, tokens, heads, dim], contiguous, in 16 bits, from keys or values of any kind."""
    batch, tokens, heads, dim = out.shape
    unit = _unit(x)
    strides = [stride // unit for stride in _strides(x)]
    arguments: dict[str, Any] = {
        "X": _bytes(x), "OUT": out, "SCALES": scale, "ZEROS": zeros,
        "length": tokens if length is None else length,
        **dict(zip(("x_batch", "x_token", "x_head", "x_dim"), strides)),
        **dict(zip(("s_batch", "s_token", "s_head"), _strides(scale))),
    }  # fmt: skip
    block_d = min(64, max(16, 1 << (x.shape[3] - 1).bit_length()))
    constants = {
        "UNIT": unit, "DIM_MAJOR": x.stride(3) == 1, "HEADS": heads, "DIM": dim,
        "KIND": kind_of(x, out), "BLOCK_N": 64, "BLOCK_D": block_d, "NATIVE_FP8": arch >= 89,
    }  # fmt: skip
    grid = (-(-tokens // 64) * -(-x.shape[3] // block_d), heads, batch)
    return Launch(kernels.expand, grid, arguments, constants, 4, 1)


def kind_of(x: torch.Tensor, Q: torch.Tensor) -> str:
    """How the kernels read a cache: "dense", "int8", "e4m3" or "int4"."""
    if x.dtype == torch.int8 and x.shape[-1] != Q.shape[-1]:
        return "int4"
    return _KINDS.get(x.dtype, "dense")


def tile_for(operands: Operands, arch: int, multiprocessors: int, k_len: int) -> Tile:
    """The tile that should be fastest. k_len: of the longest cache that it is used for."""
    Q, K, V = operands[:3]
    batch, q_len, heads, dim = Q.shape
    kv_heads = V.shape[2]
    rows = heads // kv_heads * q_len
    quantised = K.dtype != Q.dtype or V.dtype != Q.dtype
    kinds = [kind_of(x, Q) for x in (K, V)]
    if rows <= 16 and _takes_words(operands, arch):
        heads = kv_heads * batch
        if rows <= 4 and set(kinds) <= {"int8", "int4"}:
            return _tile_for_codes(dim, kinds, heads, multiprocessors, k_len)
        kind = max(kinds, key=list(_FEW).index)
        return _tile_for_few(rows, dim, kind, heads, multiprocessors, k_len)
    if "dense" not in kinds and arch == 90 and dim <= 128 and _takes_words(operands, arch):
        return _tile_for_rows(rows, dim, kinds, kv_heads * batch, multiprocessors, k_len)
    if arch < 90:  # no wgmma; 99 KiB of shared memory on sm_89
        tile = Tile(64, 32, 8, 2) if dim > 128 or quantised else Tile(128, 64, 8, 2)
    elif quantised and dim > 128:
        tile = Tile(32, 64, 8, 2)
    elif quantised:
        # H200, 64 rows, int8: 277 us with 64 rows and 128 keys, 340 with 64 keys; int4 would spill
        tile = Tile(32 if "int4" in kinds else 64, 128, 4, 2)
    elif dim <= 64:
        tile = Tile(128, 64, 4, 3)
    else:
        tile = Tile(64, 64, 4, 3) if dim <= 128 else Tile(128, 64, 8, 2)
    # H200, 32 rows, 8 x 32768 16-bit keys of 8 heads: 261 us as half of a tile that wgmma takes,
    # 300 in a tile of 32
    whole = arch >= 90 and not quantised and dim <= 128 and rows > 16 and tile.block_m == 64
    if rows <= tile.block_m // 2 and not whole:
        block_m = max(16, 1 << (rows - 1).bit_length())
        tile = replace(tile, block_m=block_m, num_warps=4, num_stages=2)
        if quantised and block_m == 16:  # registers
            tile = replace(tile, block_n=32 if dim > 64 else 64)
    if quantised and arch >= 90 and versions.takes_more_registers():
        if dim > 128:
            tile = replace(tile, block_n=32, num_warps=8)
        elif "e4m3" in kinds:
            tile = replace(tile, block_n=tile.block_n // 2, num_warps=8)
    blocks = -(-rows // tile.block_m) * kv_heads * batch
    # parts enough for two blocks on each multiprocessor, of a few steps at least
    return replace(tile, splits=_parts(2 * multiprocessors // blocks, k_len, tile.block_n))


def _parts(most: int, k_len: int, step: int) -> int:
    """How many parts of whole steps, `most` at most, make the longest part shortest; if several
    do, the fewest."""
    steps = -(-k_len // step)
    longest = -(-steps // max(1, min(most, _MOST_SPLITS)))
    return -(-steps // longest)


def _tile_for_few(
    rows: int, dim: int, kind: str, heads: int, multiprocessors: int, k_len: int
) -> Tile:
    """kind: of keys or values, whichever are wider. heads: key heads of the whole batch."""
    keys, warps, registers, stages = _FEW[kind]
    block_m = 8 if rows <= 8 or dim > 128 else 16
    if dim > 128 or block_m > 8:
        warps, registers = 4, 255
    if dim > 128:
        keys = 16
    resident = 65536 // (32 * warps * registers)  # blocks on a multiprocessor
    blocks = -(-rows // block_m) * heads
    splits = _parts(resident * multiprocessors // blocks, k_len, warps * keys)
    return Tile(block_m, keys, warps, stages, splits, "few", registers)


def _tile_for_codes(
    dim: int, kinds: Sequence[str], heads: int, multiprocessors: int, k_len: int
) -> Tile:
    """heads: key heads of the whole batch."""
    # H200, int4, 8 x 32768 keys of 8 heads, in one run: dim 128: 79 us with 12 warps on a
    # multiprocessor, 77 with 16; dim 256: 150 with 8, 164 with 12. int8: 141 with 12, 149 with 16
    registers = 255 if dim > 128 else 168
    if dim <= 128 and set(kinds) == {"int4"}:
        registers = 128
    keys, warps = 32, 4
    resident = 65536 // (32 * warps * registers)
    splits = _parts(resident * multiprocessors // heads, k_len, warps * keys)
    return Tile(4, keys, warps, 1, splits, "codes", registers)


def _tile_for_rows(
    rows: int, dim: int, kinds: Sequence[str], heads: int, multiprocessors: int, k_len: int
) -> Tile:
    """kinds: of K and V; heads: key heads of the whole batch."""
    # H200, 8 x 32768 keys of 8 heads. 32 rows: 157, 154, 142 us (int8, e4m3, int4) with four blocks
    # on a multiprocessor, 163, 159, 152 with three. 64: 228, 226, 244 with three, 230, 248, 227
    # with two. 128: 401, 400, 436 in tiles of 64, 402, 446, 418 in one of 128.
    int4 = "int4" in kinds
    block_m, warps, resident, registers = 64, 4, 3, 168
    if rows <= 32:
        block_m, resident, registers = 32, 4, 128
    elif int4 and dim == 128 and -(-rows // 64) % 2 == 0:
        block_m, warps, resident, registers = 128, 8, 1, 255
    elif int4:
        resident, registers = 2, 255
    stages = {4: 2, 3: 3, 2: 4, 1: 4}[resident]
    if set(kinds) == {"int4"}:  # half as large
        stages = 2 * stages - (resident > 1)
    blocks = -(-rows // block_m) * heads
    splits = _parts(resident * multiprocessors // blocks, k_len, 16 * warps)
    return Tile(block_m, 16 * warps, warps, stages, splits, "rows", registers)


def _takes_words(operands: Operands, arch: int) -> bool:
    """Whether the kernels that read words take the operands, 16-byte aligned as they are."""
    Q, K, V, *numbers, _ = operands
    dim = Q.shape[3]
    wanted = 89 if "e4m3" in (kind_of(K, Q), kind_of(V, Q)) else 80
    if dim not in (64, 128, 256) or arch < wanted or not versions.gluon_available():
        return False
    if any(x.stride(3) != 1 or _unit(x) == 1 for x in (Q, K, V)):
        return False
    return all(
        x is None
        or x.dtype == Q.dtype
        and _strides(x)[1] == 1
        and not any(stride % 4 for stride in _strides(x)[::2])
        for x in numbers
    )


def run(operands: Operands, out: torch.Tensor, causal: bool) -> None:
    """out [batch, q_len, heads, dim], whose dims are contiguous."""
    device, k_len = out.device, operands.K.shape[1]
    index = _index(device)
    arch = architecture(index)
    longest = _longest(k_len)

    def steps(fakes: list[Any], varying: Varying, aligned: bool) -> list[Launch]:
        given = Operands(*fakes[:-1])
        tile = tile_for(given, arch if aligned else 0, _multiprocessors(index), longest)
        return launches(given, fakes[-1], causal, tile, arch, varying)

    _start(("attend", causal, longest), [*operands, out], k_len, steps, range(1, 7))


def sources(operands: Operands, causal: bool, device: torch.device) -> list[Source]:
    """The kernels of a device's calls with such operands, 16-byte aligned; they may be on the meta
    device."""
    index = _index(device)
    arch = architecture(index)
    out = torch.empty(operands.Q.shape, dtype=operands.Q.dtype, device="meta")
    longest = _longest(operands.K.shape[1])
    tile = tile_for(operands, arch, _multiprocessors(index), longest)
    return [Source(step) for step in launches(operands, out, causal, tile, arch)]


def expand_source(
    x: torch.Tensor, out: torch.Tensor, numbers: Sequence[torch.Tensor | None], device: torch.device
) -> Source:
    """expand's kernel. numbers: scale, zeros."""
    scale, zeros = numbers
    return Source(expand_launch(x, out, scale, zeros, architecture(_index(device))))


def _index(device: torch.device) -> int:
    return current_device() if device.index is None else device.index


def _longest(k_len: int) -> int:
    """Of the caches that a prepared call serves, so that a cache that grows keeps its kernels."""
    return 1 << (k_len - 1).bit_length()


def expand(x: torch.Tensor, like: torch.Tensor, *numbers: torch.Tensor | None) -> torch.Tensor:
    """Keys or values [batch, tokens, heads, dim] of any kind and order in memory in the dtype and
    dim of `like`, contiguous. numbers: scale, zeros."""
    if 1 not in (x.stride(3), x.stride(1)):
        x = x.contiguous()
    out = torch.empty((*x.shape[:3], like.shape[3]), dtype=like.dtype, device=x.device)
    arch = architecture(_index(x.device))

    def steps(fakes: list[Any], varying: Varying, aligned: bool) -> list[Launch]:
        codes, scale, zeros, target = fakes
        return [expand_launch(codes, target, scale, zeros, arch, varying)]

    _start(("expand",), [x, *(numbers or (None, None)), out], x.shape[1], steps)
    return out


_prepared: dict[Any, Prepared] = {}


def _start(
    key: tuple[Any, ...],
    operands: list[torch.Tensor | None],
    length: int,
    steps: Callable[[list[Any], Varying, bool], list[Launch]],
    growing: Sequence[int] = (),
) -> None:
    """Start steps(operands, length, whether the operands are aligned), prepared where they are.

    growing: operands whose second dimension is the length; a call is kept for all lengths.
    """
    present = [x for x in operands if x is not None]
    addresses = [x.data_ptr() for x in present]
    device = present[0].device
    if any(address % 16 for address in addresses):
        execute(steps(operands, Varying(length), False), device)
        return
    key = (*key, device, *(_kind(x, i in growing) for i, x in enumerate(operands)))
    known = _prepared.get(key)
    if known is None:
        fakes = [_like(x) for x in operands]
        varying = Varying(length)
        places = {id(varying): len(present)}
        places |= {
            x.untyped_storage()._cdata: i for i, x in enumerate(x for x in fakes if x is not None)
        }

        def position(x: Any) -> int:
            return places[id(x) if x is varying else x.untyped_storage()._cdata]

        known = Prepared(steps(fakes, varying, True), device, len(present) + 1, position)
        if len(_prepared) >= _MOST_KEPT:
            _prepared.clear()
        _prepared[key] = known
    known.run([*addresses, length])


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _strides(x: torch.Tensor | None) -> Sequence[int]:
    """Those of dimensions of one element are 0, as they say nothing."""
    if x is None:
        return (0, 0, 0)
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride())]


def _unit(x: torch.Tensor) -> int:
    """How many elements all strides, but that of the axis which kernels take to be contiguous, are
    multiples of: 16 bytes' worth, or one."""
    unit = 16 // x.element_size()
    contiguous = 3 if x.stride(3) == 1 else 1
    others = (stride for axis, stride in enumerate(_strides(x)) if axis != contiguous)
    return 1 if any(stride % unit for stride in others) else unit


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int8) if x.element_size() == 1 else x


def _kind(x: torch.Tensor | None, grows: bool) -> Any:
    if x is None:
        return None
    return x.dtype, (x.shape[0], *x.shape[2:]) if grows else x.shape, x.stride()


def _like(x: torch.Tensor | None) -> torch.Tensor | None:
    if x is None:
        return None
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

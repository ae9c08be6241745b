"""Decoding with keys and values of 4 bits: quantise a cache, append a token, attend, compare."""

from __future__ import annotations

import sys

import torch

import bitblas


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, heads, kv_heads, dim, longest = 2, 32, 8, 128, 4096
    torch.manual_seed(0)

    # what prefill left: keys and values of 1000 tokens, in caches for up to `longest`
    K, V = (torch.randn(batch, 1000, kv_heads, dim, device=device).half() for _ in range(2))
    keys, values = (
        bitblas.QuantizedKV.empty(batch, longest, kv_heads, dim, "int4", device=device)
        for _ in range(2)
    )
    keys.write(K, 0)
    values.write(V, 0)

    # a step of decoding appends a token; where, and how many there are then, may stay on the GPU
    kv_len = torch.full((batch,), 1000, dtype=torch.int32, device=device)
    new = torch.randn(batch, 1, kv_heads, dim, device=device).half()
    keys.write(new, kv_len)
    values.write(new, kv_len)
    kv_len += 1

    attention = bitblas.FlashAtten(
        bitblas.FlashAttenConfig(
            batch, heads, kv_heads, longest, dim, K_dtype="int4", V_dtype="int4", is_causal=True
        )
    )
    Q = torch.randn(batch, 1, heads, dim, device=device).half()
    output = attention(
        Q, keys.codes, values.codes, k_scale=keys.scale, k_zeros=keys.zeros,
        v_scale=values.scale, v_zeros=values.zeros, kv_len=kv_len,
    )  # fmt: skip

    # the same with the caches expanded to float16
    dense = bitblas.FlashAtten(bitblas.FlashAttenConfig(batch, heads, kv_heads, longest, dim))
    expected = dense(
        Q, keys.dequantize(torch.float16), values.dequantize(torch.float16), kv_len=kv_len
    )
    error = ((output - expected).float().norm() / expected.float().norm()).item()
    served = attention.choice(Q, keys.codes, values.codes, kv_len)
    size = sum(x.numel() * x.element_size() for cache in (keys, values) for x in cache)
    print(f"int4 cache of {longest} tokens, {size / 2**20:.1f} MiB, on {device}, by {served!r}")
    print(f"  relative difference from attention over the expanded cache   {error:.1e}")
    return 0 if error < 2e-3 else 1


if __name__ == "__main__":
    sys.exit(main())

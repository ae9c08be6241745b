"""Formats whose codes index a table of arbitrary values."""

from __future__ import annotations

import torch

from .base import Table, WeightFormat


class NF4(WeightFormat):
    """4-bit NormalFloat (Dettmers et al., QLoRA, 2023): quantiles of a normal distribution."""

    name, bits, source_format = "nf4", 4, "nf"
    decoder = Table(
        (
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        )
    )

    def to_codes(self, weight: torch.Tensor) -> torch.Tensor:
        """nf4 weights are given as codes 0..15."""
        return self.check_codes(weight)


FORMATS = (NF4,)

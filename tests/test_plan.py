"""What the plan takes on a GPU that is not here: recorded choices, shipped ones, families."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bitblas import MatmulConfig, cache, plan
from bitblas.kernels import batch, batch8, decode, portable

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(cache, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(plan, "_architecture", lambda device: 90)
    monkeypatch.setattr(plan, "_gpu", lambda device: decode.GPU())


def product(N, K, **fields):
    zeros = {"with_scaling": True, "with_zeros": True, "zeros_mode": "original"}
    return MatmulConfig(
        N=N, K=K, A_dtype="float16", W_dtype="uint4", group_size=128, **zeros, **fields
    )


def test_a_shipped_choice_serves_all_rows_that_are_staged_alike(h200):
    for features, measured, rows in (
        ((1024, 8192), 8, range(2, 9)),
        ((4096, 4096), 16, range(9, 17)),
    ):
        config = product(*features)
        shipped = cache.recorded_choices(config, "NVIDIA H200")
        for m in rows:
            assert plan.pick(config, m, DEVICE) == (decode, decode.Tile(**shipped[measured]))


def test_every_shipped_choice_runs():
    """Each is a tile that its family knows, serves and has shared memory for."""
    path = Path(cache.__file__).parent / "shipped" / "NVIDIA_H200.json"
    for key, choices in json.loads(path.read_text()).items():
        fields = json.loads(key)
        zeros = fields["zeros_mode"]
        fields |= {"with_zeros": zeros is not None, "zeros_mode": zeros or "original"}
        assert fields.pop("k_split") == 1
        config = MatmulConfig(**fields)
        for m, choice in choices.items():
            family = decode if choice["kernel"] == "decode" else batch
            tile = family.Tile(**choice)
            assert family.serves(config, int(m), 90)
            if family is batch:
                room = decode.SHARED_BYTES // tile.per_sm
                assert batch.shared_bytes(config, tile) <= room, (key, m)
            else:
                assert decode.shared_bytes(config, int(m), tile) <= decode.SHARED_BYTES


def test_without_a_choice_the_cost_model_decides(h200):
    small, large = product(4096, 2048), product(8192, 5120)
    for config, m, family in (
        (large, 1, decode), (small, 5, decode), (small, 16, decode), (large, 5, batch),
        (large, 16, batch), (small, 17, batch), (large, 64, batch), (large, 4096, batch),
    ):  # fmt: skip
        assert not cache.recorded_choices(config, "NVIDIA H200")
        assert plan.pick(config, m, DEVICE) == (family, family.candidates(config, m)[0])


def test_a_recorded_portable_tile_serves_down_to_half_its_rows(h200, monkeypatch):
    config = product(5120, 3072)
    monkeypatch.setattr(plan, "_architecture", lambda device: 80)
    tile = portable.candidates(config, 64)[1]
    monkeypatch.setattr(cache, "recorded_choices", lambda *_: {64: dataclasses.asdict(tile)})
    assert tile != portable.candidates(config, 64)[0]
    assert plan.pick(config, 64, DEVICE) == plan.pick(config, 32, DEVICE) == (portable, tile)
    assert plan.pick(config, 31, DEVICE)[1] == portable.candidates(config, 31)[0]
    assert plan.pick(config, 65, DEVICE)[1] == portable.candidates(config, 65)[0]


def test_a_recorded_decode_tile_is_not_taken_where_the_family_does_not_serve(h200, monkeypatch):
    config = product(5120, 3072)
    tile = decode.candidates(config, 16)[-1]
    monkeypatch.setattr(cache, "recorded_choices", lambda *_: {16: dataclasses.asdict(tile)})
    assert plan.pick(config, 9, DEVICE) == (decode, tile)
    monkeypatch.setattr(plan, "_architecture", lambda device: 80)
    assert plan.pick(config, 9, DEVICE)[0] is portable


def test_rows_that_no_16_bytes_start_on_stay_portable(h200):
    """K = 3073: TMA, which the batch family loads A by, cannot read them."""
    config = MatmulConfig(N=5120, K=3073, A_dtype="float16", W_dtype="uint4", group_size=-1)
    assert plan.pick(config, 64, DEVICE)[0] is portable


def test_a_recorded_batch_tile_serves_the_rows_that_share_it(h200, monkeypatch):
    config = product(5120, 3072)
    tile = batch.candidates(config, 64)[-1]
    monkeypatch.setattr(cache, "recorded_choices", lambda *_: {64: dataclasses.asdict(tile)})
    for m in (33, 50, 64):
        assert plan.pick(config, m, DEVICE) == (batch, tile)
    for m in (32, 65):
        assert plan.pick(config, m, DEVICE) == (batch, batch.candidates(config, m)[0])


@pytest.mark.parametrize(
    "change", [{"consumers": 4}, {"warps": 8}, {"kernel": "of another release"}], ids=str
)
def test_a_recorded_choice_that_kernels_do_not_know_is_not_taken(h200, monkeypatch, change):
    config = product(5120, 3072)
    tile = dataclasses.asdict(batch.candidates(config, 64)[-1])
    monkeypatch.setattr(cache, "recorded_choices", lambda *_: {64: tile | change})
    assert plan.pick(config, 64, DEVICE) == (batch, batch.candidates(config, 64)[0])


def test_int8_activations_go_to_their_family(h200, monkeypatch):
    config = MatmulConfig(
        N=5120, K=3072, A_dtype="int8", W_dtype="int4", group_size=128, with_scaling=True
    )
    for m in (1, 16, 17, 300, 4096):
        assert plan.pick(config, m, DEVICE) == (batch8, batch8.candidates(config, m)[0])
    assert plan.pick(dataclasses.replace(config, group_size=64), 64, DEVICE)[0] is portable
    monkeypatch.setattr(plan, "_architecture", lambda device: 80)
    assert plan.pick(config, 64, DEVICE)[0] is portable


def test_rows_that_fill_a_tile_badly_are_a_product_of_their_own(h200):
    config = product(8192, 5120)
    (first, tile, rows), (second, rest, more) = plan.sections(config, 1040, DEVICE)
    assert (first, tile) == (batch, batch.candidates(config, 1024)[0])
    assert (second, rest) == (batch, batch.candidates(config, 16)[0])
    assert (rows, more) == (1024, 16)
    int8 = MatmulConfig(N=8192, K=8192, A_dtype="int8", W_dtype="int4", with_scaling=True)
    assert [family for family, *_ in plan.sections(int8, 1040, DEVICE)] == [batch8, batch8]


def test_sections_have_all_rows_and_take_less_than_one(h200):
    config = product(8192, 5120)
    for m in range(17, 4200, 23):
        found = plan.sections(config, m, DEVICE)
        assert sum(rows for *_, rows in found) == m
        assert m > 512 or len(found) == 1  # a row's bits are the same for all m of a tile
        whole = ((*plan.pick(config, m, DEVICE), m),)
        times = [plan.microseconds(config, x, DEVICE) for x in (found, whole)]
        assert found == whole or times[0] < times[1]


def test_a_recorded_choice_is_taken_for_all_rows(h200, monkeypatch):
    config = product(8192, 5120)
    tile = batch.candidates(config, 1040)[1]
    monkeypatch.setattr(cache, "recorded_choices", lambda *_: {1040: dataclasses.asdict(tile)})
    assert plan.sections(config, 1040, DEVICE) == ((batch, tile, 1040),)


def test_families_without_a_cost_model_take_all_rows(h200, monkeypatch):
    monkeypatch.setattr(plan, "_architecture", lambda device: 80)
    assert len(plan.sections(product(8192, 5120), 1040, DEVICE)) == 1


@pytest.mark.parametrize("sections_are_faster", [True, False])
def test_tuning_times_two_sections_too(h200, monkeypatch, sections_are_faster):
    config, choices = product(8192, 5120), {}
    monkeypatch.setattr(cache, "recorded_choices", lambda *_: choices)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def milliseconds(call):
        two = len(plan.sections(config, 1040, DEVICE)) == 2
        return 1.0 if two == sections_are_faster else 2.0

    monkeypatch.setattr(plan, "gpu_milliseconds", milliseconds)
    plan.tune(config, 1040, 2, lambda: None)
    best = dataclasses.asdict(batch.candidates(config, 1040)[0])
    assert choices == ({} if sections_are_faster else {1040: best})

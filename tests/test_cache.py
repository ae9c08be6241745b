"""OperatorCache and the database: what is kept, where, and what happens to a damaged entry."""

import json
import logging
import multiprocessing
import sys
from pathlib import Path

import pytest

import bitblas
from bitblas import Matmul, MatmulConfig, cache
from bitblas.cache import OperatorCache

TARGET = "cpu"
CHOICES = {1: {"block_n": 64}, 16: {"block_n": 128}}


def config(**fields):
    return MatmulConfig(**{"M": 1, "N": 32, "K": 64, "W_dtype": "uint4", **fields})


def operator(**fields):
    return Matmul(config(**fields), target=TARGET)


def filled(*configs):
    operators = OperatorCache()
    for each in configs:
        operators.add(each, Matmul(each, target=TARGET))
    return operators


def entries(root):
    return sorted(Path(root).rglob("*.json"))


@pytest.fixture(autouse=True)
def database(tmp_path, monkeypatch):
    """A database of this test's own; what is set and known is put back afterwards."""
    monkeypatch.setattr(cache, "_database_path", tmp_path / "database")
    monkeypatch.setattr(cache, "_choices", {})
    return tmp_path / "database"


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The library's log records, whatever set_log_level did before."""
    monkeypatch.setattr(logging.getLogger("bitblas"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="bitblas")
    return caplog


# --- in memory


def test_new_cache_is_empty():
    operators = OperatorCache()
    assert operators.size() == 0
    assert operators.get(config()) is None
    assert not operators.exists(config())


def test_added_operator_is_found_by_an_equal_config():
    operators, kept = OperatorCache(), operator(group_size=-1)
    operators.add(kept.config, kept)
    assert operators.get(config(group_size=64)) is kept
    assert operators.exists(config(group_size=64))
    assert not operators.exists(config(group_size=32))


def test_adding_an_equal_config_replaces_the_operator():
    first, second = operator(), operator()
    operators = OperatorCache()
    operators.add(first.config, first)
    operators.add(second.config, second)
    assert operators.get(first.config) is second
    assert operators.size() == 1


def test_size_counts_different_configs():
    assert filled(config(), config(N=48), config(W_dtype="int4")).size() == 3


def test_clear_forgets_the_operators():
    operators = filled(config())
    operators.clear()
    assert operators.size() == 0
    assert not operators.exists(config())


def test_clear_leaves_the_database(database):
    operators = filled(config())
    operators.save_into_database(target=TARGET)
    operators.clear()
    operators.load_from_database(target=TARGET)
    assert operators.exists(config())


# --- on disk


def test_saved_operators_are_loaded(tmp_path):
    configs = [config(), config(N=48, W_dtype="nf4"), config(A_dtype="int8", out_dtype="int32")]
    filled(*configs).save_into_database(tmp_path, TARGET)
    loaded = OperatorCache()
    loaded.load_from_database(tmp_path, TARGET)
    assert loaded.size() == 3
    for each in configs:
        assert loaded.get(each).config == each
        assert loaded.get(each).target == TARGET


@pytest.mark.parametrize(
    "hint",
    [{"M": [1, 64]}, {"layout": "nn"}, {"accum_dtype": "float32"}, {"storage_dtype": "int32"}],
    ids=lambda hint: next(iter(hint)),
)
def test_operators_that_share_a_kernel_are_all_loaded(tmp_path, hint):
    filled(config(), config(**hint)).save_into_database(tmp_path, TARGET)
    loaded = OperatorCache()
    loaded.load_from_database(tmp_path, TARGET)
    assert loaded.exists(config()) and loaded.exists(config(**hint))


def test_recorded_choices_are_saved_and_loaded(tmp_path, monkeypatch):
    cache.recorded_choices(config(), "cpu").update(CHOICES)
    filled(config()).save_into_database(tmp_path, TARGET)
    monkeypatch.setattr(cache, "_choices", {})
    OperatorCache().load_from_database(tmp_path, TARGET)
    assert cache.recorded_choices(config(), "cpu") == CHOICES


def test_choices_of_a_config_serve_those_that_share_its_kernel(tmp_path, monkeypatch):
    cache.recorded_choices(config(), "cpu").update(CHOICES)
    filled(config()).save_into_database(target=TARGET)
    monkeypatch.setattr(cache, "_choices", {})
    assert cache.recorded_choices(config(M=[1, 64]), "cpu") == CHOICES
    assert cache.recorded_choices(config(N=48), "cpu") == {}


def test_saving_again_replaces_the_entry(tmp_path, monkeypatch):
    operators = filled(config())
    operators.save_into_database(tmp_path, TARGET)
    cache.recorded_choices(config(), "cpu").update(CHOICES)
    operators.save_into_database(tmp_path, TARGET)
    assert len(entries(tmp_path)) == 1
    assert cache.read_entry(entries(tmp_path)[0]) == (config(), CHOICES)


def test_loading_keeps_an_operator_that_is_there(tmp_path):
    operators = filled(config())
    kept = operators.get(config())
    operators.save_into_database(tmp_path, TARGET)
    operators.load_from_database(tmp_path, TARGET)
    assert operators.get(config()) is kept


def test_folder_that_does_not_exist_holds_nothing(tmp_path):
    operators = OperatorCache()
    operators.load_from_database(tmp_path / "nowhere", TARGET)
    assert operators.size() == 0
    assert not (tmp_path / "nowhere").exists()


def test_load_global_ops_cache_fills_and_returns_the_global_cache(monkeypatch):
    monkeypatch.setattr(cache, "global_operator_cache", OperatorCache())
    filled(config()).save_into_database(target=TARGET)
    returned = bitblas.load_global_ops_cache(target=TARGET)
    assert returned is cache.global_operator_cache
    assert returned.exists(config())


@pytest.mark.parametrize("part", ["version", "device", "toolchain"])
def test_entry_of_another_environment_is_not_loaded(part, monkeypatch):
    filled(config()).save_into_database(target=TARGET)
    if part == "version":
        monkeypatch.setattr(cache, "__version__", "99.0.0")
    elif part == "device":
        monkeypatch.setattr(cache, "_target_device", lambda target: "another device")
    else:
        monkeypatch.setattr(cache, "_toolchain", lambda device: "another-1.0")
    loaded = OperatorCache()
    loaded.load_from_database(target=TARGET)
    assert loaded.size() == 0


@pytest.mark.parametrize("part", ["version", "toolchain"])
def test_choices_of_another_environment_are_not_used(part, monkeypatch):
    cache.recorded_choices(config(), "cpu").update(CHOICES)
    filled(config()).save_into_database(target=TARGET)
    monkeypatch.setattr(cache, "_choices", {})
    if part == "version":
        monkeypatch.setattr(cache, "__version__", "99.0.0")
    else:
        monkeypatch.setattr(cache, "_toolchain", lambda device: "another-1.0")
    assert cache.recorded_choices(config(), "cpu") == {}


def test_choices_are_kept_apart_by_device():
    cache.recorded_choices(config(), "cpu").update(CHOICES)
    assert cache.recorded_choices(config(), "NVIDIA H100") == {}


# --- where


def test_set_database_path_governs_saving_and_loading(tmp_path):
    bitblas.cache.set_database_path(tmp_path / "first")
    filled(config()).save_into_database(target=TARGET)
    bitblas.cache.set_database_path(tmp_path / "second")
    filled(config(N=48)).save_into_database(target=TARGET)
    loaded = OperatorCache()
    loaded.load_from_database(target=TARGET)
    assert list(loaded) == [config(N=48)]
    assert len(entries(tmp_path / "first")) == len(entries(tmp_path / "second")) == 1


def test_set_database_path_governs_recorded_choices(tmp_path):
    bitblas.cache.set_database_path(tmp_path / "first")
    cache.recorded_choices(config(), "cpu").update(CHOICES)
    filled(config()).save_into_database(target=TARGET)
    bitblas.cache.set_database_path(tmp_path / "second")
    assert cache.recorded_choices(config(), "cpu") == {}
    bitblas.cache.set_database_path(tmp_path / "first")
    assert cache.recorded_choices(config(), "cpu") == CHOICES


@pytest.mark.parametrize("kind", [str, Path])
def test_get_database_path_is_what_was_set(tmp_path, kind):
    bitblas.cache.set_database_path(kind(tmp_path / "set"))
    assert bitblas.cache.get_database_path() == str(tmp_path / "set")


def test_path_that_is_set_stays_when_the_working_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bitblas.cache.set_database_path("relative")
    monkeypatch.chdir("/")
    assert bitblas.cache.get_database_path() == str(tmp_path / "relative")


def test_path_that_is_set_goes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BITBLAS_DATABASE_PATH", str(tmp_path / "environment"))
    bitblas.cache.set_database_path(tmp_path / "set")
    assert bitblas.cache.get_database_path() == str(tmp_path / "set")


def test_environment_goes_before_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_database_path", None)
    monkeypatch.setenv("BITBLAS_DATABASE_PATH", str(tmp_path / "environment"))
    assert bitblas.cache.get_database_path() == str(tmp_path / "environment")
    monkeypatch.delenv("BITBLAS_DATABASE_PATH")
    assert "bitblas" in bitblas.cache.get_database_path()


def test_importing_and_asking_writes_nothing(database):
    OperatorCache().load_from_database(target=TARGET)
    cache.recorded_choices(config(), "cpu")
    assert not database.exists()


# --- damage


def rewritten(change):
    """A damage that edits the entry's JSON and gives it a fitting checksum again."""

    def damage(data):
        entry = json.loads(data)
        entry.pop("checksum")
        change(entry)
        return json.dumps({"checksum": cache._checksum(entry), **entry}).encode()

    return damage


DAMAGES = {
    "empty": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "last byte lost": lambda data: data[:-1],
    "one digit changed": lambda data: data.replace(b'"N": 32', b'"N": 48'),
    "checksum lost": lambda data: data.replace(b"checksum", b"chequesum"),
    "zeros": lambda data: bytes(len(data)),
    "not text": lambda data: b"\xff\xfe\xfd" + data,
    "a list": lambda data: b"[1, 2]",
    "a number": lambda data: b"7",
    "nested deeply": lambda data: b"[" * 100_000,
    "no choices": rewritten(lambda entry: entry.pop("choices")),
    "no config": rewritten(lambda entry: entry.pop("config")),
    "choices of rows that are none": rewritten(lambda entry: entry.update(choices={"x": {}})),
    "choices that are a list": rewritten(lambda entry: entry.update(choices=[1])),
    "unknown field": rewritten(lambda entry: entry["config"].update(colour="red")),
    "unknown format": rewritten(lambda entry: entry["config"].update(W_dtype="int5")),
    "size of no sense": rewritten(lambda entry: entry["config"].update(N=-1)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_entry_is_skipped_with_a_warning(damage, warnings, database):
    filled(config(), config(N=96)).save_into_database(target=TARGET)
    [path] = [p for p in entries(database) if cache.read_entry(p)[0] == config()]
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    loaded = OperatorCache()
    loaded.load_from_database(target=TARGET)
    assert list(loaded) == [config(N=96)]
    [record] = warnings.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()


@pytest.mark.parametrize("damage", ["empty", "cut in half", "zeros"])
def test_damaged_entry_gives_no_choices(damage, warnings, database):
    cache.recorded_choices(config(), "cpu").update(CHOICES)
    filled(config()).save_into_database(target=TARGET)
    [path] = entries(database)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    cache._choices.clear()
    assert cache.recorded_choices(config(), "cpu") == {}
    assert str(path) in warnings.text


def test_saving_mends_a_damaged_entry(database):
    operators = filled(config())
    operators.save_into_database(target=TARGET)
    [path] = entries(database)
    path.write_bytes(b"")
    operators.save_into_database(target=TARGET)
    assert cache.read_entry(path)[0] == config()


def test_folder_in_the_place_of_an_entry_is_skipped(warnings, database):
    filled(config()).save_into_database(target=TARGET)
    [path] = entries(database)
    path.unlink()
    path.mkdir()
    OperatorCache().load_from_database(target=TARGET)
    assert str(path) in warnings.text


def test_failed_write_leaves_the_old_entry_and_no_temporary_file(database, monkeypatch):
    filled(config()).save_into_database(target=TARGET)
    [path] = entries(database)
    before = path.read_bytes()

    def fail(*arguments, **named):
        raise OSError("no space left on device")

    monkeypatch.setattr(cache.json, "dump", fail)
    with pytest.raises(OSError, match="no space"):
        filled(config()).save_into_database(target=TARGET)
    assert [p for p in database.rglob("*") if p.is_file()] == [path]
    assert path.read_bytes() == before


# --- many processes at once

WRITERS, WRITES = 4, 20


def choices_of(writer, turn):
    """Choices that tell who wrote them, long enough for a partial write to be seen."""
    return {m: {"writer": writer, "turn": turn, "pad": "x" * 200} for m in range(1, 40)}


def write_many(folder, writer, start):
    start.wait()
    for turn in range(WRITES):
        cache.write_entry(Path(folder), config(), choices_of(writer, turn))


def test_many_processes_write_one_entry_and_every_read_is_whole(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    path = cache.write_entry(tmp_path, config(), choices_of(0, 0))
    start = context.Barrier(WRITERS + 1)
    writers = [
        context.Process(target=write_many, args=(tmp_path, number, start))
        for number in range(WRITERS)
    ]
    for process in writers:
        process.start()
    start.wait()
    reads = 0
    while reads == 0 or any(process.is_alive() for process in writers):
        entry = cache.read_entry(path)
        assert entry is not None
        found, choices = entry
        seen = choices[1]
        assert found == config()
        assert choices == choices_of(seen["writer"], seen["turn"])
        reads += 1
    for process in writers:
        process.join()
        assert process.exitcode == 0
    assert list(tmp_path.iterdir()) == [path]
    assert cache.read_entry(path)[1][1]["turn"] == WRITES - 1

"""What a night takes over from earlier ones, and what it must not."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from loop.kto.cache import KEEP_DAYS, ReferenceCache
from loop.kto.rows import Row
from loop.kto.train import train
from loop.settings import TrainSettings
from tests.kto.conftest import write

DEPENDS_ON = {"base": "b", "dtype": "float32"}


def test_an_entry_is_found_by_the_same_content_only(tmp_path: Path) -> None:
    with ReferenceCache(tmp_path, DEPENDS_ON) as cache:
        key = cache.key([1, 2], [3, 4])
        cache.put({key: -1.25})
        assert cache.get([key]) == {key: -1.25}
        assert cache.get([cache.key([1], [2, 3, 4]), cache.key([1, 2], [3])]) == {}  # another boundary, another end
    with ReferenceCache(tmp_path, DEPENDS_ON) as cache:
        assert cache.get([cache.key([1, 2], [3, 4])]) == {key: -1.25}
    for name in DEPENDS_ON:
        with ReferenceCache(tmp_path, DEPENDS_ON | {name: "other"}) as cache:
            assert cache.get([cache.key([1, 2], [3, 4])]) == {}


@pytest.mark.parametrize("damaged", [b"", b"\0" * 12, b"short"])
def test_a_damaged_entry_is_not_found(damaged: bytes, tmp_path: Path) -> None:
    with ReferenceCache(tmp_path, DEPENDS_ON) as cache:
        key = cache.key([1], [2])
        cache.put({key: -2.0})
        with cache._connection:
            cache._connection.execute("UPDATE logps SET value = ?", (damaged,))
        assert cache.get([key]) == {}
        cache.put({key: -3.0})
        assert cache.get([key]) == {key: -3.0}


def test_an_entry_of_another_key_is_damage(tmp_path: Path) -> None:
    with ReferenceCache(tmp_path, DEPENDS_ON) as cache:
        one, other = cache.key([1], [2]), cache.key([1], [3])
        cache.put({one: -2.0, other: -3.0})
        with cache._connection:
            cache._connection.execute("UPDATE logps SET value = (SELECT value FROM logps WHERE key = ?)", (one,))
        assert cache.get([one, other]) == {one: -2.0}


def test_what_no_run_asked_for_in_a_season_goes(tmp_path: Path, make_rows: Callable[..., list[Row]]) -> None:
    rows = make_rows(2, seed=1)
    with ReferenceCache(tmp_path, DEPENDS_ON, today=1000) as cache:
        asked, forgotten = cache.key([1], [2]), cache.key([1], [3])
        cache.put({asked: -1.0, forgotten: -2.0})
        cache.keep_groups("plan", rows, [0, 1])
    with ReferenceCache(tmp_path, DEPENDS_ON, today=1000 + KEEP_DAYS) as cache:
        assert cache.get([asked]) == {asked: -1.0}
        cache.keep_groups("plan", rows[:1], [0])
    with ReferenceCache(tmp_path, DEPENDS_ON, today=1001 + KEEP_DAYS):
        pass
    with ReferenceCache(tmp_path, DEPENDS_ON, today=1001 + KEEP_DAYS) as cache:
        assert cache.get([asked, forgotten]) == {asked: -1.0}
        assert cache.groups("plan", rows) == [0, None]


def test_a_file_that_is_no_database_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "reference.db").write_bytes(b"not a database, but longer than a header of a hundred bytes. " * 4)
    with ReferenceCache(tmp_path, DEPENDS_ON) as cache:
        assert cache.get([cache.key([1], [2])]) == {}
    assert (tmp_path / "reference.damaged").exists()


def test_a_night_pays_only_for_what_is_new_and_trains_the_same(
    make_rows: Callable[..., list[Row]], model_dir: Path, tmp_path: Path
) -> None:
    settings = TrainSettings(quantization="none", lora_r=4, per_device_train_batch_size=4, cache=tmp_path / "cache")
    old, new = make_rows(16, seed=1), make_rows(8, seed=2)
    console = Console(file=io.StringIO())

    def night(rows: list[Row], name: str, settings: TrainSettings = settings) -> dict[str, float]:
        return train(settings, write(rows, tmp_path / f"{name}.jsonl"), model_dir, tmp_path / name, console=console)

    first, again = night(old, "first"), night(old, "again")
    assert (first["reference_computed"], again["reference_computed"]) == (32, 0)
    for name, weights in load_file(tmp_path / "first" / "adapter_model.safetensors").items():
        assert torch.equal(weights, load_file(tmp_path / "again" / "adapter_model.safetensors")[name])
    assert night([*old, *new], "grown")["reference_computed"] == 16
    # A row has gone: the three others of its group are mismatched anew, and one of them at least with another one.
    assert 1 <= night([*old[1:], *new], "shrunk")["reference_computed"] <= 3
    other_dtype = settings.model_copy(update={"dtype": "bfloat16"})
    assert night(old, "other", other_dtype)["reference_computed"] == 32

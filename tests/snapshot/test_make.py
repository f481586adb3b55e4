from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import Engine

from loop.log import NewRecord
from loop.settings import SnapshotSettings, StoreSettings
from loop.snapshot import Snapshot, load_snapshot, make_snapshot
from loop.snapshot.split import units_of
from loop.store import open_store
from tests.join.traffic import START_MS, feedback, response, response_id
from tests.snapshot.clustered import asked_of, clusters_of
from tests.snapshot.stored import NOW_MS, example, put
from tests.store.joined import READER, apply, batch_of

SETTINGS = SnapshotSettings(held_out_share=0.2)


def unit_of(salt: str, kind: str, name: str) -> int:
    return int(units_of(salt, kind, [name.encode()])[0])


@contextmanager
def fresh_store() -> Iterator[tuple[Engine, Path]]:
    with TemporaryDirectory() as folder:
        store = open_store(StoreSettings(url=SecretStr(f"sqlite:///{folder}/store.db")))
        yield store, Path(folder)
        store.dispose()


def snapshot_of(
    rows: list[dict[str, Any]], settings: SnapshotSettings = SETTINGS
) -> tuple[Snapshot, list[Any], list[Any]]:
    """The snapshot of these examples alone, with its training and its held-out rows."""
    with fresh_store() as (store, folder):
        put(store, rows)
        made = make_snapshot(store, settings, out=folder / "snapshot", now_ms=NOW_MS)
        return made, pq.read_table(made.train_path).to_pylist(), pq.read_table(made.held_out_path).to_pylist()


def train_settings(**changes: Any) -> SnapshotSettings:
    """Settings under which (nearly) nothing is held out, to look at the other steps."""
    return SnapshotSettings(held_out_share=1e-9, **changes)


# --- the split --------------------------------------------------------------------------------------------------------

WORDINGS = [
    "how long does the delivery of article {} to the island usually take in winter",
    "how long does the delivery of article {} to the island usually take in summer",
    "can I pay the invoice for article {} with two cards at the same time please",
    "yes",
    "where is order {} number",
]
messy = st.lists(
    st.fixed_dictionaries(
        {
            "rater": st.integers(0, 8),
            "conversation": st.integers(0, 12),
            "wording": st.integers(0, len(WORDINGS) - 1),
            "slot": st.integers(0, 3),
            "history": st.booleans(),
            "up": st.booleans(),
            "second_rater": st.none() | st.integers(0, 8),
        }
    ),
    min_size=1,
    max_size=60,
)


def rows_of(drawn: list[dict[str, Any]], first: int = 0) -> list[dict[str, Any]]:
    rows = []
    for number, d in enumerate(drawn, first):
        text = WORDINGS[d["wording"]].format("abcd"[d["slot"]])
        messages = [{"role": "user", "content": text}]
        if d["history"]:
            earlier = [
                {"role": "user", "content": "and what about socks then"},
                {"role": "assistant", "content": "Fine."},
            ]
            messages = [*earlier, *messages]
        votes = [(f"rater {d['rater']}", "up" if d["up"] else "down", 1.0, number)]
        if d["second_rater"] not in (None, d["rater"]):
            votes.append((f"rater {d['second_rater']}", "up" if d["up"] else "down", 1.0, number))
        rows.append(
            example(
                number, messages=messages, votes=votes, conversation=f"c{d['conversation']}", answer=f"Answer {number}"
            )
        )
    return rows


def units(rows: list[dict[str, Any]], table: list[Any]) -> tuple[set[str], set[str], set[str]]:
    """Raters (all who voted), conversations and prompt texts of the snapshot's rows."""
    by_id = {f"chatcmpl-{r['number']:016x}-00000000-0000-7000-8000-000000000000/0": r for r in rows}
    sources = [by_id[row["example_id"]] for row in table]
    return (
        {vote[0] for r in sources for vote in r["votes"]},
        {r["conversation"] for r in sources},
        {asked_of(r["messages"]) for r in sources},
    )


@given(messy)
@settings(max_examples=40)
def test_nothing_of_a_held_out_unit_is_trained_on(drawn: list[dict[str, Any]]) -> None:
    rows = rows_of(drawn)
    _, train, held_out = snapshot_of(rows)
    raters, conversations, prompts = units(rows, train)
    salt, limit = SETTINGS.salt, SETTINGS.held_out_share * 2**64
    assert not [name for name in raters if unit_of(salt, "rater", name) < limit]
    assert not [name for name in conversations if unit_of(salt, "conversation", name) < limit]
    assert not prompts & {prompt for prompt in units(rows, held_out)[2] if prompt_is_held_out(prompt, rows)}, (
        "a prompt cluster is on both sides"
    )


def prompt_is_held_out(prompt: str, rows: list[dict[str, Any]]) -> bool:
    """By the definition: the smallest unit of its cluster decides."""
    texts = sorted({asked_of(r["messages"]) for r in rows})
    clusters = clusters_of(texts, SETTINGS.near_duplicate_similarity, SETTINGS.salt)
    mine = clusters[texts.index(prompt)]
    units = [unit_of(SETTINGS.salt, "cluster", text) for text in texts]
    smallest = min(unit for unit, cluster in zip(units, clusters, strict=True) if cluster == mine)
    return smallest < SETTINGS.held_out_share * 2**64


@given(st.lists(messy, min_size=2, max_size=3))
@settings(max_examples=25)
def test_what_was_held_out_stays_held_out_as_data_grows(nights: list[list[dict[str, Any]]]) -> None:
    rows: list[dict[str, Any]] = []
    held_ids: set[str] = set()
    with fresh_store() as (store, folder):
        for night, drawn in enumerate(nights):
            fresh = rows_of(drawn, first=len(rows))
            rows += fresh
            put(store, fresh)
            made = make_snapshot(store, SETTINGS, out=folder / str(night), now_ms=NOW_MS)
            trained = {row["example_id"] for row in pq.read_table(made.train_path).to_pylist()}
            assert not trained & held_ids
            held_ids |= {row["example_id"] for row in pq.read_table(made.held_out_path).to_pylist()}


def test_a_lower_share_later_frees_nobody() -> None:
    rows = [example(n, votes=[(f"rater {n % 40}", "up", 1.0, n)]) for n in range(200)]
    with fresh_store() as (store, folder):
        put(store, rows)
        first = make_snapshot(store, SETTINGS, out=folder / "1", now_ms=NOW_MS)
        second = make_snapshot(store, train_settings(), out=folder / "2", now_ms=NOW_MS)
        held = [set(pq.read_table(made.held_out_path)["example_id"].to_pylist()) for made in (first, second)]
        assert held[0] == held[1] != set()


def test_where_clusters_merge_held_out_wins() -> None:
    words = "this question has quite a few words so that one more or less of them changes very little at all"
    salt = SETTINGS.salt
    tails = [f"{words} x{'y' * n}" for n in range(200)]

    def is_low(kind: str, name: str) -> bool:
        return unit_of(salt, kind, name) < SETTINGS.held_out_share * 2**64

    held = next(tail for tail in tails if is_low("cluster", tail))
    free = next(tail for tail in tails if not is_low("cluster", tail) and unit_of(salt, "cluster", tail) < 2**63)
    others = [n for n in range(100) if not is_low("rater", f"w{n}") and not is_low("conversation", f"k{n}")]
    strict = SETTINGS.model_copy(update={"near_duplicate_similarity": 1.0})
    rows = [
        example(n, messages=[{"role": "user", "content": text}], votes=[(f"w{n}", "up", 1.0, n)], conversation=f"k{n}")
        for n, text in zip(others, [held, free], strict=False)
    ]
    with fresh_store() as (store, folder):
        put(store, rows)
        apart = make_snapshot(store, strict, out=folder / "apart", now_ms=NOW_MS)
        together = make_snapshot(store, SETTINGS, out=folder / "together", now_ms=NOW_MS)
        assert pq.read_table(apart.train_path).num_rows == 1
        assert pq.read_table(together.train_path).num_rows == 0


# --- identity ---------------------------------------------------------------------------------------------------------


@given(messy, st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_the_same_examples_in_any_order_give_the_same_snapshot(drawn: list[dict[str, Any]], rng: random.Random) -> None:
    rows = rows_of(drawn)
    shuffled = rng.sample(rows, len(rows))
    assert snapshot_of(rows)[0].snapshot_id == snapshot_of(shuffled)[0].snapshot_id


def test_the_id_follows_from_content_and_settings_only(store: Engine, tmp_path: Path) -> None:
    put(store, [example(n) for n in range(60)])
    first = make_snapshot(store, SETTINGS, out=tmp_path / "a", now_ms=NOW_MS)
    later = make_snapshot(store, SETTINGS, out=tmp_path / "b", now_ms=NOW_MS + 1000)
    other = make_snapshot(store, SnapshotSettings(salt="other"), out=tmp_path / "c", now_ms=NOW_MS)
    assert first.snapshot_id == later.snapshot_id != other.snapshot_id


def test_a_finished_snapshot_is_returned_as_it_is(store: Engine, tmp_path: Path) -> None:
    put(store, [example(n) for n in range(20)])
    (tmp_path / ".a-left" / "spool").mkdir(parents=True)  # as after a kill -9
    first = make_snapshot(store, SETTINGS, out=tmp_path / "a", now_ms=NOW_MS)
    put(store, [example(n) for n in range(20, 40)])
    assert make_snapshot(store, SETTINGS, out=tmp_path / "a", now_ms=NOW_MS) == first
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_manifest_has_the_files_hashes_and_every_step(store: Engine, tmp_path: Path) -> None:
    put(store, [example(n) for n in range(60)])
    made = make_snapshot(store, SETTINGS, out=tmp_path / "a", now_ms=NOW_MS)
    manifest = json.loads((made.path / "manifest.json").read_text())
    for path in (made.train_path, made.held_out_path):
        assert manifest["files"][path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (
        sum(made.steps.values()) + sum(file["desirable"] + file["undesirable"] for file in manifest["files"].values())
        == 60
    )
    assert load_snapshot(made.path) == made
    assert json.loads(json.dumps(made.summary()))["snapshot_id"] == made.snapshot_id


def test_a_folder_that_is_no_snapshot_is_refused(store: Engine, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="not a whole snapshot"):
        make_snapshot(store, SETTINGS, out=tmp_path / "taken", now_ms=NOW_MS)


@pytest.mark.parametrize("ids", [[1, 2**31], [-1, 1], []])
def test_token_ids_that_no_vocabulary_has_are_not_known(ids: list[int]) -> None:
    _, (row,), _ = snapshot_of([example(1, completion_ids=ids)], train_settings())
    assert (row["prompt_ids"], row["completion_ids"], row["source"]) == (None, None, "template")


def test_an_empty_window_gives_an_empty_snapshot(store: Engine, tmp_path: Path) -> None:
    put(store, [example(1, days_ago=400)])
    made = make_snapshot(store, SETTINGS, out=tmp_path / "a", now_ms=NOW_MS)
    assert made.read == 0
    assert pq.read_table(made.train_path).num_rows == 0


# --- curation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "changes", "setting"),
    [
        ("unlabelled", {"votes": []}, {}),
        ("unlabelled", {"votes": [("r", "up", 0.0, 1)]}, {}),  # a vote of no weight is none
        ("aborted", {"aborted": True}, {}),
        ("aborted", {"finish_reason": "abort"}, {}),
        ("truncated", {"finish_reason": "length"}, {}),
        ("empty", {"answer": "", "completion_ids": None}, {}),
        ("untokenized", {"prompt_ids": None}, {"allow_untokenized": False}),
        ("untokenized", {"completion_ids": None}, {"allow_untokenized": False}),
        ("untokenized", {"prompt_ids": [1, -1]}, {"allow_untokenized": False}),
        ("untokenized", {"completion_ids": [2**31, 1]}, {"allow_untokenized": False}),
        ("media", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {}),
        ("untemplated", {"prompt_ids": None, "messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, {}),
        ("too_long", {"prompt_ids": [1] * 10}, {"max_tokens": 12}),
        ("disagreement", {"votes": [("a", "up", 1.0, 1), ("b", "down", 1.0, 2)]}, {}),  # a tie
        (
            "disagreement",
            {"votes": [("a", "up", 1.0, 1), ("b", "up", 1.0, 2), ("c", "down", 1.0, 3)]},
            {"disagreement": "drop"},
        ),
    ],
)
def test_a_step_drops_and_counts(step: str, changes: dict[str, Any], setting: dict[str, Any]) -> None:
    made, train, _ = snapshot_of([example(1), example(2, **changes)], train_settings(**setting))
    assert {name: dropped for name, dropped in made.steps.items() if dropped} == {step: 1}
    assert [row["completion"][0]["content"] for row in train] == ["It costs 1 crowns."]


def test_the_majority_is_the_label_and_weights_count() -> None:
    votes = [("a", "up", 1.0, 1), ("b", "up", 1.0, 2), ("c", "down", 1.0, 3)]
    light = [("a", "up", 0.2, 1), ("b", "up", 0.2, 2), ("c", "down", 1.0, 3)]
    _, train, _ = snapshot_of(
        [example(1, votes=votes), example(2, votes=light)],
        train_settings(desirable_weight=1.0, undesirable_weight=1.0),
    )
    assert {row["completion"][0]["content"]: (row["label"], row["rater"], row["weight"]) for row in train} == {
        "It costs 1 crowns.": (True, "b", 1.0),
        "It costs 2 crowns.": (False, "c", 1.0),
    }


def test_the_same_answer_again_is_one_row_with_all_votes() -> None:
    same = {"messages": [{"role": "user", "content": "What is the fee?"}], "answer": "Five.", "completion_ids": None}
    rows = [
        example(1, **same, votes=[("a", "up", 1.0, 1)]),
        example(2, **same, votes=[("b", "down", 1.0, 2)]),
        example(3, **same, votes=[("c", "down", 1.0, 3)]),
        example(4, **same, votes=[("a", "down", 1.0, 4)]),  # the same rater changed their mind: the last vote counts
    ]
    made, train, _ = snapshot_of(rows, train_settings(desirable_weight=1.0, undesirable_weight=1.0))
    assert made.steps["exact_duplicates"] == 3
    assert [(row["label"], row["rater"], row["source"]) for row in train] == [(False, "a", "template")]


def test_a_correction_is_a_desirable_row_of_its_own_without_token_ids() -> None:
    votes = [("a", "down", 1.0, 1, "Free of charge."), ("b", "up", 0.5, 2, "Nothing.")]
    made, train, _ = snapshot_of(
        [example(1, votes=votes, completion_ids=[9])], train_settings(desirable_weight=1.0, undesirable_weight=1.0)
    )
    assert made.read == 3
    rows = {row["completion"][0]["content"]: row for row in train}
    assert {text: (row["label"], row["rater"], row["weight"], row["source"]) for text, row in rows.items()} == {
        "It costs 1 crowns.": (False, "a", 1.0, "served"),
        "Free of charge.": (True, "a", 1.0, "template"),
        "Nothing.": (True, "b", 0.5, "template"),
    }
    served = rows.pop("It costs 1 crowns.")
    for row in rows.values():
        assert (row["prompt"], row["conversation_id"]) == (served["prompt"], served["conversation_id"])
        assert (row["prompt_ids"], row["completion_ids"]) == (None, None)


def test_a_correction_that_is_the_answer_is_no_row_of_its_own() -> None:
    made, train, _ = snapshot_of([example(1, votes=[("a", "up", 1.0, 1, "It costs 1 crowns.")])], train_settings())
    assert (made.read, [row["source"] for row in train]) == (1, ["served"])


def test_a_correction_is_learnt_from_though_the_answer_is_not() -> None:
    vote = ("a", "down", 1.0, 1, "All of it.")
    made, train, _ = snapshot_of([example(1, finish_reason="length", votes=[vote])], train_settings())
    assert ([row["completion"][0]["content"] for row in train], made.steps["truncated"]) == (["All of it."], 1)


def test_a_correction_comes_and_goes_with_its_vote(store: Engine, tmp_path: Path) -> None:
    def labels(*events: NewRecord) -> dict[str, bool]:
        apply(store, READER, batch_of(*events), {})
        made = make_snapshot(store, train_settings(), out=tmp_path / f"of {len(events)}", now_ms=START_MS)
        rows = pq.read_table(made.train_path).to_pylist()
        return {row["completion"][0]["content"]: row["label"] for row in rows}

    id, hlc = response_id("a" * 16, 1), START_MS << 16
    vote = feedback("f", "down", hlc, response_id=id, correction="No.")
    assert labels(response(id), vote) == {"Yes.": False, "No.": True}
    assert labels(feedback("g", "retract", hlc + 1, response_id=id)) == {}


@given(messy, st.data())
@settings(max_examples=15)
def test_every_standing_vote_has_one_correction_at_most(drawn: list[dict[str, Any]], data: Any) -> None:
    rows = rows_of(drawn)
    expected = set()
    for row in rows:
        row["votes"] = [
            (*vote, data.draw(st.none() | st.sampled_from(["", "Yes.", row["answer"]]))) for vote in row["votes"]
        ]
        prompt = row["messages"][-1]["content"]
        expected |= {(prompt, vote[4]) for vote in row["votes"] if vote[4] == "Yes."}
    made, train, held_out = snapshot_of(
        rows, SnapshotSettings(held_out_share=0.2, max_per_rater=None, max_per_prompt=None)
    )
    corrections = [row for row in [*train, *held_out] if row["completion"][0]["content"] == "Yes."]
    assert {(row["prompt"][-1]["content"], "Yes.") for row in corrections} == expected
    assert all(row["label"] and row["completion_ids"] is None for row in corrections)
    assert made.read == len(train) + len(held_out) + sum(made.steps.values())


def test_held_out_duplicates_stay_apart_by_rater() -> None:
    same = {"messages": [{"role": "user", "content": "What is the fee for a parcel?"}], "answer": "Five."}
    rows = [example(n, **same, votes=[(f"r{n // 2}", "up", 1.0, n)]) for n in range(8)]
    made, train, held_out = snapshot_of(rows, SnapshotSettings(held_out_share=0.999999))
    assert (len(train), len(held_out), made.steps["exact_duplicates"]) == (0, 4, 4)


def test_caps_keep_the_newest_and_bind_training_only() -> None:
    rows = [example(n, votes=[("busy", "up", 1.0, n)], days_ago=0) for n in range(10)]
    made, train, _ = snapshot_of(rows, train_settings(max_per_rater=3))
    assert made.steps["max_per_rater"] == 7
    assert {row["completion"][0]["content"] for row in train} == {f"It costs {n} crowns." for n in (7, 8, 9)}

    prompt = [{"role": "user", "content": "What does it cost to send this one?"}]
    rows = [example(n, messages=prompt, votes=[(f"r{n}", "up", 1.0, n)]) for n in range(10)]
    assert snapshot_of(rows, train_settings(max_per_prompt=4))[0].steps["max_per_prompt"] == 6
    everything_held = SnapshotSettings(held_out_share=0.999999, max_per_prompt=4, max_per_rater=1)
    assert len(snapshot_of(rows, everything_held)[2]) == 10


@given(st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=15)
def test_weights_bring_the_classes_into_the_papers_range(ups: int, downs: int) -> None:
    values = ["up"] * ups + ["down"] * downs
    made, train, _ = snapshot_of(
        [example(n, votes=[(f"r{n}", value, 1.0, n)]) for n, value in enumerate(values)], train_settings()
    )
    total = {label: sum(row["weight"] for row in train if row["label"] == label) for label in (True, False)}
    assert 1 - 1e-9 <= total[True] / total[False] <= 4 / 3 + 1e-9
    assert min(made.desirable_weight, made.undesirable_weight) == 1.0

"""The events' contract for other programs: the committed JSON Schemas are the code's, and they only ever grow."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from loop.events import (
    FEEDBACK_TYPE,
    RESPONSE_TYPE,
    Choice,
    EventError,
    FeedbackGiven,
    ResponseLogged,
    decode_feedback,
    decode_response,
    encode,
)
from loop.schemas import breaking_changes, schemas, write_schemas
from tests.join.traffic import RESPONSES, START_MS, colliding_events, response_id

COMMITTED = {
    path.stem: json.loads(path.read_text()) for path in Path(__file__).parents[1].glob("deploy/schemas/*.json")
}
TYPES = [RESPONSE_TYPE, FEEDBACK_TYPE]
VALIDATORS = {name: Draft202012Validator(schema) for name, schema in COMMITTED.items()}
DECODERS: dict[str, Callable[[bytes], Any]] = {RESPONSE_TYPE: decode_response, FEEDBACK_TYPE: decode_feedback}
UNREAD = {"specversion", "source", "subject", "datacontenttype"}  # CloudEvents' attributes that the reader does without
KEY = "a" * 16
ID = response_id(KEY, 1)


def written(data: ResponseLogged | FeedbackGiven) -> Any:
    """The event as it is on the log, parsed."""
    return json.loads(encode(data, event_id="e", key=KEY, source="/gateways/1", now_ms=START_MS))


# Every field is set, and to something else than its default, which would be left out.
FULL = {
    RESPONSE_TYPE: written(
        ResponseLogged(
            response_id=ID,
            choices=[Choice({"role": "assistant", "content": "Yes."}, 1, [1, 2], "stop", [-0.5, -1.0])],
            messages=[{"role": "user", "content": "Is it?"}],
            prompt="Is it?",
            prompt_token_ids=[3],
            endpoint="completions",
            alias="assistant",
            adapter="assistant@v000001",
            arm="canary",
            generation=3,
            conversation_id="c",
            rater="r",
            message_id="m",
            tools=[{"type": "function"}],
            params={"temperature": 0.5},
            aborted=True,
            started_at_ms=START_MS,
            first_token_s=0.25,
            duration_s=1.5,
            trace="00-1-2-01",
            redacted=True,
            stored=False,
            imported=True,
            extra={"tree": 1},
        )
    ),
    FEEDBACK_TYPE: written(
        FeedbackGiven(
            feedback_id="f",
            value="up",
            hlc=START_MS << 16,
            response_id=ID,
            message_id="m",
            choice_index=1,
            names_choice=False,
            rater="r",
            weight=0.5,
            source="implicit",
            comment="kind",
            reasons=["tone"],
            correction="No.",
        )
    ),
}
OPTIONAL = {
    RESPONSE_TYPE: FULL[RESPONSE_TYPE]["data"].keys() - {"response_id", "choices"},
    FEEDBACK_TYPE: FULL[FEEDBACK_TYPE]["data"].keys() - {"feedback_id", "value", "hlc"},
}
CASES = [(type_, name) for type_ in TYPES for name in sorted(OPTIONAL[type_])]


def is_read(type_: str, event: Any) -> bool:
    try:
        DECODERS[type_](json.dumps(event).encode())
    except EventError:
        return False
    return True


def fits(type_: str, event: Any) -> bool:
    return bool(VALIDATORS[type_].is_valid(event))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in inner:
        yield (*at, name)
        yield from places(child, (*at, name))


def found_at(value: Any, place: tuple[Any, ...]) -> Any:
    for name in place:
        value = value[name]
    return value


# --- the committed files ---------------------------------------------------------------------------------------------


def test_the_committed_schemas_are_the_codes() -> None:
    assert schemas() == COMMITTED, "run `make schemas`"


@pytest.mark.parametrize("type_", TYPES)
def test_a_schema_has_only_grown_since_it_was_committed(type_: str) -> None:
    assert breaking_changes(COMMITTED[type_], schemas()[type_]) == []
    Draft202012Validator.check_schema(COMMITTED[type_])


def test_writing_them_again_cannot_hide_a_break(tmp_path: Path) -> None:
    write_schemas(tmp_path)
    response, feedback = (tmp_path / f"{type_}.json" for type_ in TYPES)
    assert json.loads(feedback.read_text()) == COMMITTED[FEEDBACK_TYPE]
    older = copy.deepcopy(COMMITTED)
    del older[RESPONSE_TYPE]["$defs"]["ResponseLogged"]["properties"]["trace"]  # before that field was there
    older[FEEDBACK_TYPE]["$defs"]["FeedbackGiven"]["properties"]["emoji"] = {"type": "string"}  # which was taken out
    response.write_text(json.dumps(older[RESPONSE_TYPE]))
    feedback.write_text(json.dumps(older[FEEDBACK_TYPE]))
    with pytest.raises(ValueError, match=r"FeedbackGiven/properties/emoji is gone; expected new optional fields only"):
        write_schemas(tmp_path)
    assert json.loads(response.read_text()) == older[RESPONSE_TYPE]
    feedback.unlink()
    write_schemas(tmp_path)
    assert json.loads(response.read_text()) == COMMITTED[RESPONSE_TYPE]


# --- what is additive ------------------------------------------------------------------------------------------------

OLD = schemas()[FEEDBACK_TYPE]
BREAKS: dict[str, Callable[[Any, Any], Any]] = {  # of the envelope and the data
    "a removed field": lambda _, data: data["properties"].pop("comment"),
    "a removed envelope attribute": lambda envelope, _: envelope["properties"].pop("subject"),
    "a field that becomes required": lambda _, data: data["required"].append("rater"),
    "a new field that is required": lambda _, data: (
        data["properties"].update(new={"type": "string"}),
        data["required"].append("new"),
    ),
    "a required field that becomes optional, for older readers": lambda _, data: data["required"].remove("hlc"),
    "a narrowed bound": lambda _, data: data["properties"]["weight"].update(maximum=10),
    "a widened bound, for older readers": lambda _, data: data["properties"]["weight"].update(maximum=1e9),
    "a bound that was not there": lambda _, data: data["properties"]["comment"].update(maxLength=10),
    "a bound that is gone, for older readers": lambda _, data: data["properties"]["feedback_id"].pop("maxLength"),
    "another pattern": lambda _, data: data["properties"]["feedback_id"].update(pattern="^[a-z]+$"),
    "another type": lambda _, data: data["properties"]["hlc"].update(type="string"),
    "no null any more": lambda _, data: data["properties"]["comment"]["anyOf"].pop(),
    "a value less": lambda _, data: data["properties"]["value"]["enum"].pop(),
    "a value more, for older readers": lambda _, data: data["properties"]["value"]["enum"].append("shrug"),
    "another default, for events without the field": lambda _, data: data["properties"]["weight"].update(default=2.0),
    "no fields but ours": lambda _, data: data.update(additionalProperties=False),
    "no rule about the target": lambda _, data: data.pop("anyOf"),
    "another event type": lambda envelope, _: envelope["properties"].update(type={"const": "v2"}),
}
GROWTHS: dict[str, Callable[[Any, Any], Any]] = {
    "nothing": lambda _, data: None,
    "a new optional field": lambda _, data: data["properties"].update(new={"type": "string", "maxLength": 3}),
    "a new optional attribute": lambda envelope, _: envelope["properties"].update(new={"type": "string"}),
    "another description": lambda envelope, _: envelope.update(description="Better said."),
    "a field called description": lambda _, data: data["properties"].update(description={"type": "string"}),
}


def changed(change: Callable[[Any, Any], Any]) -> Any:
    new = copy.deepcopy(OLD)
    change(new["$defs"]["FeedbackEvent"], new["$defs"]["FeedbackGiven"])
    return new


@pytest.mark.parametrize("change", BREAKS.values(), ids=BREAKS.keys())
def test_a_break_is_found(change: Callable[[Any, Any], Any]) -> None:
    assert breaking_changes(OLD, changed(change))


@pytest.mark.parametrize("change", GROWTHS.values(), ids=GROWTHS.keys())
def test_growth_is_none(change: Callable[[Any, Any], Any]) -> None:
    assert breaking_changes(OLD, changed(change)) == []


def test_a_field_that_is_taken_out_once_more_is_a_break() -> None:
    grown = changed(lambda _, data: data["properties"].update(description={"type": "string"}))
    assert breaking_changes(grown, OLD) == ["/$defs/FeedbackGiven/properties/description is gone"]


@given(place=st.sampled_from([place for place in places(OLD) if place[-1] not in ("title", "description")]))
def test_whatever_is_taken_out_is_a_break(place: tuple[Any, ...]) -> None:
    new = copy.deepcopy(OLD)
    del found_at(new, place[:-1])[place[-1]]
    assert breaking_changes(OLD, new)


# --- events against them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", TYPES)
def test_every_field_and_attribute_that_we_write_is_in_the_schema(type_: str) -> None:
    assert fits(type_, FULL[type_])
    definitions = COMMITTED[type_]["$defs"]
    (envelope,) = (found for name, found in definitions.items() if name.endswith("Event"))
    assert FULL[type_].keys() == envelope["properties"].keys()
    data = definitions["ResponseLogged" if type_ == RESPONSE_TYPE else "FeedbackGiven"]
    assert FULL[type_]["data"].keys() == data["properties"].keys()


def test_what_gateways_write_fits() -> None:
    for record in colliding_events(1, 500):
        type_ = RESPONSE_TYPE if record.topic == RESPONSES else FEEDBACK_TYPE
        assert fits(type_, json.loads(record.value))


@pytest.mark.parametrize(("type_", "field"), CASES)
def test_an_older_version_without_an_optional_field_is_read(type_: str, field: str) -> None:
    event = copy.deepcopy(FULL[type_])
    del event["data"][field]
    assert fits(type_, event)
    assert is_read(type_, event)


@pytest.mark.parametrize("type_", TYPES)
def test_the_least_that_another_producer_may_send_is_read(type_: str) -> None:
    event = {name: value for name, value in FULL[type_].items() if name not in {"subject", "datacontenttype"}}
    target = {"message_id"} if type_ == FEEDBACK_TYPE else set()
    event["data"] = {k: v for k, v in event["data"].items() if k not in OPTIONAL[type_] - target}
    if type_ == RESPONSE_TYPE:
        event["data"]["choices"] = [{"message": {"content": "Yes."}}]  # no token ids
    assert fits(type_, event)
    assert is_read(type_, event)
    assert is_read(type_, {name: value for name, value in event.items() if name not in UNREAD})


@pytest.mark.parametrize("type_", TYPES)
def test_a_newer_version_with_more_everywhere_is_read(type_: str) -> None:
    event = copy.deepcopy(FULL[type_])
    for place in [(), *places(FULL[type_])]:
        inside = found_at(event, place)
        if isinstance(inside, dict):
            inside["of_another"] = {"deep": [1, None]}
    assert fits(type_, event)
    assert is_read(type_, event)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**66), 2**66),
    # JSON Schema takes 1.0 for an integer, we do not: the schemas' description says so.
    st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: not number.is_integer()),
    st.text(max_size=5),
    st.sampled_from(["", "up", "chat", "x" * 80, "x" * 300, "a\0b", ID, ID + "\n", KEY, KEY + "\n", RESPONSE_TYPE]),
)
texts = st.text(max_size=3)
values = st.recursive(scalars, lambda of: st.lists(of, max_size=2) | st.dictionaries(texts, of, max_size=2))


@given(type_=st.sampled_from(TYPES), value=values, data=st.data())
def test_what_fits_is_read_and_what_does_not_fit_is_not(type_: str, value: Any, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(list(places(FULL[type_]))))
    event = copy.deepcopy(FULL[type_])
    found_at(event, place[:-1])[place[-1]] = value
    if fits(type_, event):
        assert is_read(type_, event)
    elif place[0] not in UNREAD:
        assert not is_read(type_, event)

"""What is private never reaches the disk, and nothing else is lost for it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from loop.events import Choice, FeedbackGiven, ResponseLogged, decode_feedback, decode_response, encode
from services.gateway import feedback, redactor
from services.gateway.redact import Span, builtin, presidio, redact_event, redact_text
from services.gateway.redactor import RedactionError, Redactor
from tests.gateway.conftest import HELLO, PATIENCE_S, Gateway, StartGateway, install_beside, until
from tests.gateway.test_feedback import RESPONSE_ID

KEY = "0123456789abcdef"
CARD = "4111 1111 1111 1111"
SECRET = "sk-" + "a1" * 12
IBAN = "DE89370400440532013000"
PRESIDIO = "presidio-analyzer==2.2.366"


def clean(text: str) -> str:
    return redact_text(text, builtin)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail bob.o@example.co.uk, please", "mail <EMAIL>, please"),
        ("<jürgen+x@münchen.example>.", "<<EMAIL>>."),
        ("https://user:word@host.example/path", "https://user:<EMAIL>/path"),
        (f"my card {CARD} 12/29 code 123", "my card <CARD> 12/29 code 123"),
        ("4111111111111111", "<CARD>"),
        ("3782 822463 10005", "<CARD>"),  # American Express' groups
        (f"{CARD} 123", "<CARD>"),  # with its code right behind it
        ("call +49 (0)30 123456-7 now", "call <PHONE> now"),
        ("0044 20 7946 0958", "<PHONE>"),
        ("030/1234567", "<PHONE>"),
        ("06 12 34 56 78", "<PHONE>"),
        ("(212) 555-0123 or 212.555.0123", "<PHONE> or <PHONE>"),
        ("+1 (212) 555-0123", "<PHONE>"),
        (f"key={SECRET};", "key=<KEY>;"),
        ("AKIAIOSFODNN7EXAMPLE", "<KEY>"),
        ("ghp_" + "a" * 36, "<KEY>"),
        ("Authorization: Bearer abcdefghijklmnop.qrst", "Authorization: <KEY>"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "<KEY>"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----\nend", "<KEY>\nend"),
        ("data:image/png;base64,iVBORw0KGgo=", "<MEDIA>"),
        ("QUJD" * 300, "<MEDIA>"),  # sound, as `input_audio` has it
    ],
)
def test_the_builtin_set_finds(text: str, expected: str) -> None:
    assert clean(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # not by Luhn's check
        "2026-11-21T22:40:00Z, 01.02.2026, 03/04/2026, 22:40",
        "0.123456789 and 3.14159265358979, -0.5, 1e10",
        "order 1234567890, parcel 12345678901234567",
        "192.168.178.254:8080, 10.0.0.1",
        "a @ b, @handle, foo@bar, git@",
        "C++ 2011, 1 + 1 = 2, 100-200, the years 1999 2000 2001",
        "token by token, skip-this-word-please",
        "data: no picture, only text; base64, they say",
        "",
    ],
)
def test_the_builtin_set_leaves_alone(text: str) -> None:
    assert clean(text) == text


@given(st.text(max_size=300))
def test_what_is_clean_stays_so(text: str) -> None:
    once = clean(text)
    assert clean(once) == once


@pytest.mark.parametrize(
    "piece", ["a", "a.", "1", "1 ", "0", "+1", "(", "-", "@", "a@", "eyJ", "sk-", "-----BEGIN PRIVATE KEY-----"]
)
def test_the_time_grows_with_the_text_only(piece: str) -> None:
    # A pattern that is not linear takes minutes for this.
    clean(piece * (400_000 // len(piece)) + "!")


def response(**fields: Any) -> bytes:
    data = ResponseLogged(response_id=RESPONSE_ID, prompt_token_ids=[1, 2], started_at_ms=1_795_254_438_000, **fields)
    return encode(data, event_id=RESPONSE_ID, key=KEY, source="s", now_ms=0)


def answered(content: Any) -> list[Choice]:
    return [Choice({"role": "assistant", "content": content}, 0, [3, 4], "stop", [-0.5, -0.5])]


def test_a_changed_response_loses_its_token_ids_and_is_marked() -> None:
    paid = {"card": 4111111111111111, "from": 4111111111111111.0, "to": "a@b.example", f"ghp_{KEY}": 0.5, "a b": [True]}
    call = {"function": {"name": "pay", "arguments": json.dumps(paid)}}
    event = response(
        choices=[Choice({"content": None, "tool_calls": [call]}, 0, [3], "tool_calls", [-0.5]), *answered("fine")],
        messages=[{"role": "user", "content": [{"type": "text", "text": "I am a@b.example"}]}],
        params={"stop": [SECRET], "temperature": 0.5},
        conversation_id="c",
        message_id="030/1234567",  # votes are found by it
    )
    found = decode_response(redact_event(event, builtin))
    data = found.data
    assert found.partitionkey == KEY
    assert (data.redacted, data.prompt_token_ids) == (True, None)
    assert [(choice.token_ids, choice.logprobs) for choice in data.choices] == [(None, None)] * 2
    assert (data.messages or [])[0]["content"][0]["text"] == "I am <EMAIL>"
    arguments = data.choices[0].message["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"card": "<CARD>", "from": "<CARD>", "to": "<EMAIL>", "<KEY>": 0.5, "a b": [True]}
    assert data.params == {"stop": ["<KEY>"], "temperature": 0.5}
    assert (data.response_id, data.conversation_id, data.message_id) == (RESPONSE_ID, "c", "030/1234567")
    assert (data.choices[1].message["content"], data.choices[1].finish_reason) == ("fine", "stop")


def test_what_has_nothing_private_is_the_same_to_the_byte() -> None:
    event = response(choices=answered("The order 1234 is on its way."), messages=[{"role": "user", "content": "hi"}])
    assert redact_event(event, builtin) == event


def test_a_votes_comment_is_redacted_and_the_vote_stays() -> None:
    given = FeedbackGiven(
        feedback_id="f", value="up", hlc=1_795_254_438_000 << 16, response_id=RESPONSE_ID, comment="to a@b.example"
    )
    event = encode(given, event_id="e", key=KEY, source="s", now_ms=0)
    found = decode_feedback(redact_event(event, builtin)).data
    assert (found.comment, found.hlc, found.feedback_id, found.value) == ("to <EMAIL>", given.hlc, "f", "up")


# --- Presidio: its adapter's contract, on a recogniser of our own where the package is not there ---------------------


@pytest.fixture
def analyzer(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A module in Presidio's place, which finds Ann; what it was called with."""
    calls: list[Any] = []

    class AnalyzerEngineProvider:
        def __init__(self, analyzer_engine_conf_file: Path | None = None) -> None:
            calls.append(analyzer_engine_conf_file)

        def create_engine(self) -> Any:
            return SimpleNamespace(supported_languages=["en", "de"], analyze=analyze)

    def analyze(*, text: str, language: str) -> list[Any]:
        calls.append(language)
        at = text.find("Ann")
        return [] if at < 0 else [SimpleNamespace(start=at, end=at + 3, entity_type="PERSON", score=0.85)]

    for name in ("presidio_analyzer", "presidio_analyzer.analyzer_engine_provider"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    provider = sys.modules["presidio_analyzer.analyzer_engine_provider"]
    provider.AnalyzerEngineProvider = AnalyzerEngineProvider  # type: ignore[attr-defined]
    return calls


def test_presidio_adds_to_the_builtin_set(analyzer: list[Any]) -> None:
    recognise = presidio(Path("presidio.yaml"))
    assert redact_text("Ann has a@b.example", recognise) == "<PERSON> has <EMAIL>"
    assert analyzer == [Path("presidio.yaml"), "en", "de"]


def test_overlaps_are_one() -> None:
    spans = [Span(2, 6, "B"), Span(0, 4, "A"), Span(5, 8, "C"), Span(8, 9, "D")]
    assert redact_text("0123456789", lambda _: spans) == "<A><D>9"


async def test_the_real_presidio_finds_what_the_builtin_set_does_not(
    start: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    await install_beside(packages, PRESIDIO)
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])  # so that the gateway sees it
    monkeypatch.setenv("PYTHONPATH", str(packages))  # so that its child does
    make = f"import spacy; spacy.blank('en').to_disk({str(tmp_path / 'model')!r})"  # no language is learnt, rules apply
    assert await (await asyncio.create_subprocess_exec(sys.executable, "-c", make)).wait() == 0
    config = tmp_path / "presidio.yaml"
    model = {"lang_code": "en", "model_name": str(tmp_path / "model")}
    # JSON is YAML.
    config.write_text(
        json.dumps(
            {
                "supported_languages": ["en"],
                "nlp_configuration": {"nlp_engine_name": "spacy", "models": [model]},
            }
        )
    )
    gateway = await start(redaction="presidio", presidio_config=config)
    status, _, _ = await gateway.chat(messages=[{"role": "user", "content": f"from {IBAN}, for bob@example.com"}])
    assert status == 200
    (logged,) = gateway.responses()
    assert logged.messages == [{"role": "user", "content": "from <IBAN_CODE>, for <EMAIL>"}]
    assert (logged.redacted, logged.prompt_token_ids) == (True, None)
    assert IBAN.encode() not in on_disk(gateway)


async def test_presidio_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'thumbwheel\[presidio\]'"):
        Redactor("presidio", None)


# --- in the gateway --------------------------------------------------------------------------------------------------


def lost(reason: str) -> float:
    return REGISTRY.get_sample_value("thumbwheel_gateway_responses_lost_total", {"reason": reason}) or 0.0


def on_disk(gateway: Gateway) -> bytes:
    return b"".join(path.read_bytes() for path in gateway.spool_path.parent.iterdir() if path.is_file())


@pytest.fixture
async def private(start: StartGateway) -> Gateway:
    gateway = await start(redaction="builtin")
    assert gateway.parts.redactor is not None
    await gateway.parts.redactor.redact(response(choices=[]), is_feedback=False)  # its child is there now
    return gateway


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_private_reaches_the_disk(private: Gateway, stream: bool) -> None:
    ask = {"messages": [{"role": "user", "content": f"card {CARD}"}], "user": "bob@example.com", "stream": stream}
    status, _, _ = await private.chat(**ask)
    assert status == 200
    (logged,) = private.responses()
    assert logged.messages == [{"role": "user", "content": "card <CARD>"}]
    assert (logged.redacted, logged.prompt_token_ids, logged.choices[0].token_ids) == (True, None, None)
    body = {"message_id": "m", "value": "down", "comment": "answer me at bob@example.com", "correction": CARD}
    assert (await private.post("/v1/feedback", body))[0] == 202
    (vote,) = private.feedback()
    assert (vote.comment, vote.correction) == ("answer me at <EMAIL>", "<CARD>")
    found = on_disk(private)
    assert CARD.encode() not in found
    assert b"bob@example.com" not in found


async def test_the_app_gets_its_answer_unchanged(private: Gateway) -> None:
    _, body, _ = await private.chat(model="assistant", messages=[{"role": "user", "content": CARD}])
    (logged,) = private.responses()
    assert body["choices"][0]["message"]["content"] == logged.choices[0].message["content"]


async def test_a_response_without_private_parts_keeps_its_token_ids(private: Gateway) -> None:
    await private.chat()
    (logged,) = private.responses()
    assert (logged.redacted, logged.prompt_token_ids) == (False, [2, 277, 3])


async def test_a_prompt_of_token_ids_cannot_be_looked_into_and_does_not_stay(private: Gateway) -> None:
    assert (await private.post("/v1/completions", {"model": "assistant", "prompt": [2, 277, 3]}))[0] == 200
    (logged,) = private.responses()
    assert (logged.redacted, logged.prompt_token_ids, logged.choices[0].token_ids) == (True, None, None)
    assert logged.choices[0].message["content"].startswith(" word0")


def child_of(gateway: Gateway) -> int:
    assert gateway.parts.redactor is not None
    assert gateway.parts.redactor._child is not None
    return gateway.parts.redactor._child.pid


async def test_a_redactor_that_hangs_withholds_the_record_and_holds_up_nobody(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start(redaction="builtin", capture_timeout_s=0.05)
    await gateway.chat()
    await until(lambda: bool(gateway.responses()))  # by then the redactor has started
    before = lost("redaction")
    with monkeypatch.context() as impatient:  # with this one alone: the others are only as slow as the machine
        impatient.setattr(redactor, "TIMEOUT_S", 0.3)
        os.kill(child_of(gateway), signal.SIGSTOP)
        assert (await gateway.chat(messages=[{"role": "user", "content": CARD}]))[0] == 200
        body = {"message_id": "m", "value": "up", "comment": CARD, "reasons": ["wrong"]}
        status, _, _ = await gateway.post("/v1/feedback", body)
        assert status == 202  # by then a new one is there, or the texts are left out
        await until(lambda: lost("redaction") > before)
    (vote,) = gateway.feedback()
    assert (vote.value, CARD in (vote.comment or "")) == ("up", False)
    assert (await gateway.chat(messages=[{"role": "user", "content": "later"}]))[0] == 200  # the next child is well
    await until(lambda: gateway.responses()[-1].messages == [{"role": "user", "content": "later"}])
    assert len(gateway.responses()) == 2
    assert CARD.encode() not in on_disk(gateway)


async def test_a_redactor_that_fails_withholds_the_record(private: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    await private.chat()
    before = lost("redaction")
    # Nested deeper than the redactor goes.
    ask = HELLO | {"messages": [{"role": "user", "content": CARD}], "deep": json.loads("[" * 700 + "]" * 700)}
    assert (await private.post("/v1/chat/completions", ask))[0] == 200
    assert lost("redaction") == before + 1
    assert len(private.responses()) == 1
    assert CARD.encode() not in on_disk(private)
    assert CARD not in caplog.text
    assert "event withheld" in caplog.text


async def test_where_no_redactor_can_be_started_events_are_withheld_until_one_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Redactor("builtin", None)
    event = response(choices=[])
    with monkeypatch.context() as full:

        async def no_room(*_: object, **__: object) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        full.setattr(asyncio, "create_subprocess_exec", no_room)
        for _ in range(2):
            with pytest.raises(RedactionError, match="did not start"):
                await one.redact(event, is_feedback=False)
    monkeypatch.setattr(one, "_retry_at_s", 0.0)
    assert b'"redacted":true' in await one.redact(event, is_feedback=False)
    await one.close()


async def test_a_redactor_that_hangs_at_its_start_holds_up_no_vote(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, real = [], asyncio.create_subprocess_exec

    async def hanging(*_: object, **pipes: Any) -> asyncio.subprocess.Process:
        started.append(await real("sleep", "3600", **pipes))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", hanging)
    monkeypatch.setattr(feedback, "REDACTION_TIMEOUT_S", 0.3)
    gateway = await start(redaction="builtin")
    plain: dict[str, Any] = {"message_id": "m", "value": "up"}
    assert (await gateway.post("/v1/feedback", plain))[0] == 202  # with nothing to be redacted
    items = [plain | {"comment": CARD, "feedback_id": str(n)} for n in range(999)]
    _, body, _ = await gateway.post("/v1/feedback", {"items": [*items, plain]})  # 300 s, if each waited its 0.3
    results = [(item["status"], item.get("text")) for item in body["items"]]
    assert results == [(202, "withheld")] * 999 + [(202, None)]
    _, body, _ = await gateway.post("/v1/feedback", plain | {"correction": CARD})
    assert (body["status"], body["text"]) == ("accepted", "withheld")
    assert len(gateway.feedback()) == 1_002
    assert CARD.encode() not in on_disk(gateway)
    assert len(started) == 1
    # Those are forgotten when it can be asked, and not asked one by one.
    monkeypatch.setattr(asyncio, "create_subprocess_exec", real)
    started[0].kill()
    assert gateway.parts.redactor is not None
    monkeypatch.setattr(redactor, "RETRY_S", 0.0)
    clean = await gateway.parts.redactor.redact(response(choices=[]), is_feedback=False)
    assert b'"redacted":true' in clean


async def test_what_waits_at_the_end_is_written_first(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gateway.spool.REDACT_WITHIN_S", PATIENCE_S)
    gateway = await start(redaction="builtin", capture_timeout_s=0.001)
    await asyncio.gather(*(gateway.chat() for _ in range(50)))
    await gateway.app.cleanup()
    assert len(gateway.responses()) == 50


async def test_an_event_is_answered_with_an_error_once_the_redactor_is_closed() -> None:
    one = Redactor("builtin", None)
    waiting = asyncio.create_task(one.redact(response(choices=[]), is_feedback=False))
    await asyncio.sleep(0)
    await one.close()
    with pytest.raises(RedactionError, match="the gateway ends"):
        await waiting


# --- what the app wants kept out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "headers"),
    [
        ({"store": False}, {}),
        ({}, {"X-Thumbwheel-Store": "false"}),
        ({"store": "false"}, {}),  # is no boolean, and clear enough
        ({}, {"X-Thumbwheel-Store": "no"}),
    ],
)
async def test_what_must_not_be_stored_leaves_an_event_without_content(
    gateway: Gateway, field: dict[str, Any], headers: dict[str, str], stream: bool
) -> None:
    ask = HELLO | field | {"stream": stream, "user": "zebra-77", "temperature": 0.25, "metadata": {"message_id": "m1"}}
    status, _, answer = await gateway.post("/v1/chat/completions", ask, headers)
    assert status == 200
    assert "X-Thumbwheel-Feedback-Token" not in answer.headers
    (logged,) = gateway.responses()
    assert logged.response_id == answer.headers["X-Thumbwheel-Response-Id"]
    expected = ResponseLogged(
        response_id=logged.response_id,
        choices=[],
        stored=False,
        alias="assistant",
        adapter="base",
        message_id="m1",
        started_at_ms=logged.started_at_ms,
        first_token_s=logged.first_token_s,
        duration_s=logged.duration_s,
    )
    assert logged == expected
    for secret in (b"hello", b"word1", b"zebra-77"):
        assert secret not in on_disk(gateway)

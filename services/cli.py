"""The `thumbwheel` command. Each command reads the settings, calls one function and prints what it gave.

Nothing heavy is imported until a command needs it: the gateway starts without torch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

from loop.settings import Settings, SettingsError, TrainSettings, load_settings

app = typer.Typer(
    help="Users' thumbs become a better model every night.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
keys = typer.Typer(help="API keys: make, list, revoke.", no_args_is_help=True)
app.add_typer(keys, name="keys")
console = Console(stderr=True)
SettingsFile = Annotated[
    Path | None, typer.Option("--settings", help="TOML file; else THUMBWHEEL_SETTINGS, else ./thumbwheel.toml")
]
TrainingRows = Annotated[Path, typer.Option(help="A snapshot's Parquet file, or JSONL of the KTO form.")]
BaseModelDir = Annotated[Path, typer.Option(help="Base model in Transformers' layout.")]


def main() -> None:
    """Run the command; bad input ends with status 2 and one clear line, not with a traceback."""
    try:
        app()
    # SettingsError, RegistryError, row and event errors; a log or a store that is away
    except (ValueError, FileNotFoundError, ConnectionError) as exc:
        console.print(f"[red]error[/]: {exc}", highlight=False, markup=True)
        sys.exit(2)


def _settings(path: Path | None) -> Settings:
    return load_settings(path)


def _until_terminated(serve: Callable[[threading.Event], object]) -> None:
    """Run a service until SIGTERM or SIGINT has set its event and it has finished in order."""
    from services.logging import set_up_logging

    set_up_logging()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    serve(stop)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, default=str), flush=True)


# --- processes -------------------------------------------------------------------------------------------------------


@app.command()
def up(
    settings: SettingsFile = None, logs: Annotated[Path, typer.Option(help="Folder of the logs.")] = Path("var/logs")
) -> None:
    """Run everything on this machine: the engine where `engine.start` says so, and all services."""
    from services.up import run_up

    raise typer.Exit(run_up(_settings(settings), settings, logs))


@app.command()
def gateway(settings: SettingsFile = None) -> None:
    """Run the gateway in front of vLLM."""
    from services.logging import set_up_logging

    set_up_logging()
    tree = _settings(settings)
    if tree.gateway.processes > 1 and tree.gateway.process is None:
        from services.gateway.processes import supervise

        raise typer.Exit(supervise(tree.gateway, [] if settings is None else ["--settings", str(settings)]))
    from services.gateway.app import main as serve

    serve(tree)


@app.command()
def joiner(settings: SettingsFile = None) -> None:
    """Run the consumer that joins responses with feedback."""
    from services.joiner import run_joiner

    tree = _settings(settings)
    _until_terminated(lambda stop: run_joiner(tree, stop))


@app.command()
def scheduler(settings: SettingsFile = None) -> None:
    """Run the clock: nightly runs, and the watch over the rollout."""
    from services.scheduler import run_scheduler

    tree = _settings(settings)
    _until_terminated(lambda stop: run_scheduler(tree, stop))


@app.command(name="console")
def console_pages(settings: SettingsFile = None) -> None:
    """Serve the operator pages."""
    from services.console.app import main as serve
    from services.logging import set_up_logging

    set_up_logging()
    serve(_settings(settings))


@app.command(name="open-webui")
def open_webui(
    settings: SettingsFile = None, once: Annotated[bool, typer.Option("--once", help="Look once, then end.")] = False
) -> None:
    """Vote with the ratings that Open WebUI keeps, as they come."""
    from services.open_webui import run_open_webui

    section = _settings(settings).open_webui
    _until_terminated(lambda stop: _print_json(run_open_webui(section, stop, once=once)))


# --- data, training, scoring -----------------------------------------------------------------------------------------


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSONL, JSON or Parquet with prompt, completion, label.")],
    settings: SettingsFile = None,
) -> None:
    """Send logged answers and their labels through the same log as live traffic; twice is as once."""
    from loop.importing import import_rows

    _print_json(import_rows(_settings(settings), file))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    data: TrainingRows,
    model: BaseModelDir,
    out: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    settings: SettingsFile = None,
) -> None:
    """Train one adapter. Every setting of the section train is a flag too, such as --beta 0.2 --quantization none."""
    section = _with_flags(_settings(settings).train, context.args)
    _log_to_console()
    from loop.kto import train as training

    if section.processes == 1:
        _print_json(training.train(section, data, model, out, console=console))
        return
    with TemporaryDirectory() as folder:
        settings_json = Path(folder) / "train.json"
        settings_json.write_text(section.model_dump_json())
        command = [sys.executable, "-m", *training.command(section, settings_json, data, model, out)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:  # at the pipe's end its processes end
            status = child.wait()
    raise typer.Exit(status)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sweep(
    context: typer.Context,
    data: TrainingRows,
    model: BaseModelDir,
    out: Annotated[Path, typer.Option(help="Folder of the runs, the table and the plot.")],
    betas: Annotated[str, typer.Option(help="Values of beta, comma-separated.")] = "0.05,0.1,0.2,0.5",
    learning_rates: Annotated[str, typer.Option(help="Values of learning_rate; else the setting's.")] = "",
    settings: SettingsFile = None,
) -> None:
    """Train one adapter for each beta and learning rate; plot validation accuracy against KL. Flags as for train."""
    section = _with_flags(_settings(settings).train, context.args)
    _log_to_console()
    from loop.kto.sweep import sweep as sweep_over

    rates = _numbers("learning-rates", learning_rates) or [section.learning_rate]
    _print_json(sweep_over(section, data, model, out, _numbers("betas", betas), rates, console=console))


def _numbers(name: str, values: str) -> list[float]:
    try:
        return [float(value) for value in values.split(",") if value]
    except ValueError as exc:
        raise SettingsError(f"--{name} {values}: {exc}; expected numbers with commas between them") from exc


def _log_to_console() -> None:
    """What training says of its data, beside its bars."""
    from rich.logging import RichHandler

    logging.getLogger("loop").setLevel(logging.INFO)
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])


@app.command()
def score(
    model: BaseModelDir,
    data: Annotated[Path, typer.Option(help="Rows (prompt, completion, label) or pairs (prompt, chosen, rejected).")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter in PEFT's layout.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="Jinja chat template, or a file of one.")] = None,
    quantization: Annotated[Literal["none", "nf4"], typer.Option(help="The base's weights.")] = "none",
    settings: SettingsFile = None,
) -> None:
    """Score rows or pairs by their log-probs."""
    section = _settings(settings).train
    from loop.kto.score import score_file

    template = chat_template or section.chat_template
    figures = score_file(model, data, adapter, chat_template=template, quantization=quantization, dtype=section.dtype)
    _print_json(figures)


def _with_flags(section: TrainSettings, arguments: list[str]) -> TrainSettings:
    """The section with `--key value` or `--key=value` flags over it, checked like the file's values."""
    flags: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag, separator, value = rest.pop(0).partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or key not in TrainSettings.model_fields:
            raise SettingsError(f"{flag}: unknown flag; expected one of the settings of [train], such as --beta 0.1")
        if not separator:
            if not rest:
                raise SettingsError(f"{flag}: expected a value behind it")
            value = rest.pop(0)
        flags[f"THUMBWHEEL_TRAIN__{key.upper()}"] = value
    checked = load_settings(Path(os.devnull), flags) if flags else None
    changed = {} if checked is None else {key: getattr(checked.train, key) for key in checked.train.model_fields_set}
    return section.model_copy(update=changed)


# --- the nightly run and the rollout ---------------------------------------------------------------------------------


@app.command()
def run(
    settings: SettingsFile = None,
    wait: Annotated[bool, typer.Option(help="Stay until the run has ended.")] = True,
) -> None:
    """Start a nightly run now: by the scheduler where one is running, else here."""
    from loop.nightly import new_run_id
    from loop.rollout.swap import open_fleet
    from loop.store import open_store
    from loop.store.runs import get_run, is_leased, request_run
    from services.scheduler import work_on
    from services.status import follow_run

    tree = _settings(settings)
    store = open_store(tree.store)
    now_ms = int(time.time() * 1000)
    asked = request_run(store, new_run_id(now_ms), "operator", now_ms)
    is_done = False
    if not is_leased(store, "rollout", now_ms):  # no scheduler is running
        fleet, holder = open_fleet(tree, store), f"cli-{os.getpid()}"
        _until_terminated(lambda stop: work_on(tree, fleet, asked, holder, stop))
        is_done = get_run(store, asked.run_id) not in (None, asked)
    if wait and not is_done:
        follow_run(store, tree, asked.run_id, console)
    ended = get_run(store, asked.run_id)
    assert ended is not None
    report = tree.scheduler.runs_dir / asked.run_id / "report.html"
    _print_json({**vars(ended), "report": str(report) if report.is_file() else None})
    if ended.state == "failed":
        raise typer.Exit(1)


@app.command()
def status(settings: SettingsFile = None) -> None:
    """Show what serves, what ran and what is waiting."""
    from loop.store import open_store
    from services.status import show_status

    tree = _settings(settings)
    show_status(open_store(tree.store), tree, Console())


@app.command()
def adapters(settings: SettingsFile = None) -> None:
    """List every adapter version, with its state, lineage and verdict."""
    from loop.registry import list_adapters
    from loop.store import open_store

    table = Table(
        Column("version", no_wrap=True), Column("state", no_wrap=True), "parent", "run", "snapshot", "verdict", "path"
    )
    for adapter in list_adapters(open_store(_settings(settings).store)):
        snapshot, verdict = adapter.manifest.get("snapshot", ""), adapter.manifest.get("verdict", "")
        if "learned_from_erased" in adapter.manifest:
            verdict += f", learned from what was erased {adapter.manifest['learned_from_erased']}"
        table.add_row(
            adapter.version,
            adapter.state,
            adapter.parent or "base",
            adapter.run_id,
            snapshot[:12],
            verdict,
            adapter.path,
        )
    Console().print(table)


@app.command()
def promote(version: Annotated[str, typer.Argument(help="v000012")], settings: SettingsFile = None) -> None:
    """Give all of the traffic to a version that has passed the gate."""
    from loop.rollout.swap import go_live

    _move(settings, lambda fleet, now_ms: go_live(fleet, version, "promoted by an operator", now_ms))


@app.command()
def rollback(
    settings: SettingsFile = None, reason: Annotated[str, typer.Option(help="Kept in the history.")] = "by an operator"
) -> None:
    """Take back the canary, else the live version, at once."""
    from loop.rollout.swap import roll_back

    _move(settings, lambda fleet, now_ms: roll_back(fleet, f"rolled back: {reason}", now_ms))


def _move(path: Path | None, change: Callable[[Any, int], Any]) -> None:
    from loop.rollout.swap import open_fleet, wait_for_gateways
    from loop.store import open_store

    tree = _settings(path)
    fleet = open_fleet(tree, open_store(tree.store))
    route = change(fleet, int(time.time() * 1000))
    acknowledged = wait_for_gateways(fleet, route.generation, tree.rollout.drain_timeout_s)
    _print_json({**vars(route), "acknowledged": acknowledged})


# --- the event log ---------------------------------------------------------------------------------------------------


@app.command(name="log")
def log_(
    settings: SettingsFile = None,
    topic: Annotated[str | None, typer.Option(help="Only dead letters of this topic.")] = None,
    partition: Annotated[int | None, typer.Option(help="Only dead letters of this partition.")] = None,
    offset: Annotated[int | None, typer.Option(help="Only dead letters at this offset.")] = None,
    replay: Annotated[bool, typer.Option("--replay", help="Append these dead letters to their topics again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show topics, lag and dead letters; after a fix, replay dead letters: what is still broken becomes one again."""
    from loop.log.open import open_log
    from loop.store import open_store
    from loop.store.dead_letters import replay_dead_letters
    from loop.store.engine import reaching
    from services.log_view import choose, describe_log, show_log

    tree = _settings(settings)
    chosen = choose(tree.log, topic, partition, offset)
    store, log = open_store(tree.store), open_log(tree.log)
    with reaching(store):
        found = (
            {"replayed": replay_dead_letters(store, log, chosen)} if replay else describe_log(store, log, tree, chosen)
        )
    if replay or as_json:
        _print_json(found)
    else:
        show_log(found, Console())
    log.close()


# --- who may call, and whose data is kept ----------------------------------------------------------------------------


@keys.command(name="add")
def add_key(
    name: Annotated[str, typer.Argument(help="Whose it is; during a rotation two keys have one name.")],
    scopes: Annotated[str, typer.Option(help="What it permits: chat, feedback, admin; comma-separated.")] = (
        "chat,feedback"
    ),
    settings: SettingsFile = None,
) -> None:
    """Make an API key and print it, once; gateways take it from their next poll on."""
    from loop.keys import read_scopes
    from loop.store import open_store
    from loop.store.keys import add_key as add

    permitted = read_scopes(scopes)
    key, text = add(open_store(_settings(settings).store), name, permitted, int(time.time() * 1000))
    _print_json({"key_id": key.key_id, "name": key.name, "scopes": key.scopes, "key": text})


@keys.command(name="list")
def list_keys(settings: SettingsFile = None) -> None:
    """List every key that ever was."""
    from loop.store import open_store
    from loop.store.keys import read_keys

    table = Table(Column("key", no_wrap=True), "name", "scopes", "made", "revoked")
    for key in read_keys(open_store(_settings(settings).store)):
        revoked = "" if key.revoked_at_ms is None else _moment(key.revoked_at_ms)
        table.add_row(key.key_id, key.name, ", ".join(key.scopes), _moment(key.created_at_ms), revoked)
    Console().print(table)


@keys.command(name="revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="As `thumbwheel keys list` shows it.")], settings: SettingsFile = None
) -> None:
    """Take a key back; gateways refuse it from their next poll on."""
    from loop.store import open_store
    from loop.store.keys import revoke_key as revoke

    key = revoke(open_store(_settings(settings).store), key_id, int(time.time() * 1000))
    _print_json({"key_id": key.key_id, "name": key.name, "revoked_at_ms": key.revoked_at_ms})


@app.command()
def forget(
    rater: Annotated[str | None, typer.Option(help="Somebody's votes, by the app's own id for that person.")] = None,
    user: Annotated[str | None, typer.Option(help="These, and every response that this person asked for.")] = None,
    response: Annotated[str | None, typer.Option(help="One response and the votes on it, by its response_id.")] = None,
    settings: SettingsFile = None,
) -> None:
    """Erase a person or a response for good, wherever this machine keeps it, and block their return by a replay.

    Safe to call again, as after a failure, and to be called on every machine that has gateways, snapshots or caches.
    """
    from loop.erasure import Kind
    from loop.events import hash_rater, key_of_response_id
    from loop.store import open_store
    from loop.store.engine import reaching
    from services.forget import forget as erase

    tree = _settings(settings)
    given: dict[Kind, str | None] = {"rater": rater, "user": user, "response": response}
    named = {kind: subject for kind, subject in given.items() if subject}
    if len(named) != 1:
        raise ValueError(f"expected one of --rater, --user and --response, got {len(named)}")
    ((kind, subject),) = named.items()
    if kind == "response":
        key_of_response_id(subject)
    else:
        subject = hash_rater(tree.gateway.rater_salt.get_secret_value().encode(), subject)
    store = open_store(tree.store)
    with reaching(store):
        _print_json(erase(tree, store, kind, subject))


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# --- settings --------------------------------------------------------------------------------------------------------


@app.command(name="settings")
def settings_(settings: SettingsFile = None) -> None:
    """Print the effective settings, secrets masked."""
    print(_settings(settings).model_dump_json(indent=2))


if __name__ == "__main__":
    main()

"""Every setting of Thumbwheel: typed, bounded, documented, in one frozen tree.

Read once, at a process's start, from `thumbwheel.toml` and then from `THUMBWHEEL_<SECTION>__<KEY>` in the environment
(`THUMBWHEEL_TRAIN__BETA=0.2`); parts receive their own section, never the tree. This module knows no other module.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

ENVIRONMENT_PREFIX = "THUMBWHEEL_"
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
ImplicitWeight = Annotated[float, Field(gt=0, le=1)]


class SettingsError(ValueError):
    """A setting is unknown, of the wrong type or out of bounds; the message names key, value and bound."""


class Section(BaseModel):
    """One part's settings; unknown keys are refused, values are never changed after the start."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class EngineSettings(Section):
    """The vLLM servers that generate."""

    urls: Annotated[list[str], Field(min_length=1)] = ["http://127.0.0.1:8100"]
    """Base URLs of the vLLM replicas, without /v1."""
    model: Path = Path("model")
    """Directory of the base model in Transformers' layout, as vLLM serves it and the trainer loads it."""
    base_name: str = "base"
    """The name under which vLLM serves the base model (--served-model-name)."""
    alias: str = "assistant"
    """The model name that chat apps ask for; the gateway maps it to an adapter version."""
    api_key: SecretStr | None = None
    """Key that the engine expects, if it was started with --api-key."""
    start: bool = False
    """Whether `thumbwheel up` starts one vLLM server itself, on the first URL's port."""
    start_args: list[str] = []
    """More arguments for the server that `thumbwheel up` starts, for instance ["--dtype", "float32"]."""
    max_model_len: Annotated[int, Field(ge=16)] = 4096
    """Longest context in tokens of the server that `thumbwheel up` starts."""
    request_timeout_s: Seconds = 600.0
    """Longest time that one upstream request may take."""
    connect_timeout_s: Seconds = 5.0
    """Longest time to connect to the engine."""


class GatewaySettings(Section):
    """The sidecar in front of vLLM."""

    host: str = "127.0.0.1"
    """Address to listen on; loopback only, as long as there is no API key."""
    port: Port = 8080
    """Port of the public API."""
    metrics_port: Port = 9101
    """Port of /metrics and /healthz, apart from the public one."""
    gateway_id: str = "gateway-1"
    """Name of this process among the gateways of all machines; acknowledgements, events and the spool carry it."""
    processes: Annotated[int, Field(ge=1, le=128)] = 1
    """Processes that share both ports, for more than one core; each has a spool of its own, and where they become
    fewer, the first one takes up what the others have left.
    """
    process: Annotated[int, Field(ge=0)] | None = None
    """Number of this one of the `processes`; `thumbwheel gateway` sets it in those that it starts."""
    api_keys: list[SecretStr] = []
    """Keys with every scope beside those of `thumbwheel keys`: for a deployment that makes its secrets itself, and for
    the console's playground, which presents the first. Taking one back needs a restart."""
    token_secret: SecretStr | None = None
    """Secret that signs feedback tokens; without one, a random one is made at each start."""
    previous_token_secrets: list[SecretStr] = []
    """Other secrets whose tokens are good: those that it has replaced; with several gateways also the next one, which
    all have to know before the first signs with it.
    """
    token_ttl_s: Annotated[int, Field(ge=60, le=31_536_000)] = 7 * 86_400
    """How long a feedback token may be used."""
    rater_salt: SecretStr = SecretStr("thumbwheel")
    """Key of the hash under which raters are stored; must be changed where the gateway listens beyond loopback."""
    key_requests_per_s: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Requests of one API key in a second, on average, in each of the `processes`; none for any number."""
    rater_requests_per_s: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Requests and votes of one rater in a second, on average, in each of the `processes`; none for any number."""
    rate_burst_s: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """How many seconds' worth of requests may come at once."""
    cors_origins: list[str] = []
    """Origins that browsers may call from; where no API key is asked for, pages of others are refused."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 32 * 1024 * 1024
    """Largest request body."""
    max_open_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    """Most requests for the engine at once; above, callers get a 503 with `Retry-After` before their body is read."""
    max_open_bytes: Annotated[int, Field(ge=1024)] = 256 * 1024 * 1024
    """Most bytes of these requests' bodies, as far as they have come; memory takes some three times as much. Above,
    callers get the same 503; one request alone is always taken."""
    max_header_bytes: Annotated[int, Field(ge=1024, le=1 << 20)] = 32 * 1024
    """Largest request headers, all of them together."""
    spool_quota_bytes: Annotated[int, Field(ge=1 << 20)] = 4 * 1024**3
    """Disk that records may take which wait for Kafka or, in the embedded log, for the joiner (what is joined does not
    count); past it, and with less than 256 MiB free on the disk, responses are dropped and counted, feedback never."""
    capture_timeout_s: Annotated[float, Field(gt=0, le=5)] = 0.05
    """Longest wait for the spool before the last byte of a response is sent."""
    redaction: Literal["builtin", "presidio"] | None = None
    """What takes private parts out before anything is written: `builtin` finds mail addresses, phone and card numbers,
    and keys; `presidio` also what Microsoft Presidio finds (extra `presidio`); none for no redaction. Ids that an app
    gives its messages and conversations stay as they are."""
    presidio_config: Path | None = None
    """Presidio's own configuration of its analyzer (YAML); none for its defaults."""
    route_poll_s: Annotated[float, Field(gt=0, le=60)] = 0.5
    """How often routes and API keys are read from the store."""
    drain_timeout_s: Seconds = 30.0
    """How long open requests and streams may go on after SIGTERM."""
    regenerate_weight: ImplicitWeight | None = None
    """Weight of the vote against an answer that is asked for again in its conversation, where the same machine's
    gateways answer both; none: no such votes."""
    copy_weight: ImplicitWeight | None = None
    """Weight of votes with the source `copy`: the app saw the answer copied; none: they are refused."""
    edit_weight: ImplicitWeight | None = None
    """Weight of votes with the source `edit`: the app saw an edit of the answer accepted; none: they are refused."""


class LangfuseSettings(Section):
    """Which of the scores that Langfuse clients send are thumbs, and which way they point."""

    score_names: list[str] = ["user-feedback"]
    """Names of scores that are thumbs; those of other names are accepted and dropped."""
    up_from: Annotated[float, Field(ge=-1e9, le=1e9)] = 0.5
    """Smallest numeric score that is a thumb up; boolean ones are what they are."""
    down_below: Annotated[float, Field(ge=-1e9, le=1e9)] = 0.5
    """Numeric scores below this are a thumb down; one between the two takes the vote back."""
    up_words: list[str] = ["up", "thumbs_up", "positive", "good", "yes"]
    """Categories that are a thumb up, in lower case."""
    down_words: list[str] = ["down", "thumbs_down", "negative", "bad", "no"]
    """Categories that are a thumb down, in lower case."""

    @model_validator(mode="after")
    def _apart(self) -> LangfuseSettings:
        if self.down_below > self.up_from:
            raise ValueError(
                f"langfuse.down_below is {self.down_below}, above langfuse.up_from = {self.up_from}: a score "
                "between them would be both; expected at most as much"
            )
        return self


class OpenWebuiSettings(Section):
    """The Open WebUI whose users' ratings become votes."""

    url: str | None = None
    """Its address; none: there is none to read."""
    token: SecretStr | None = None
    """API key of one of its admins."""
    gateway_url: str = "http://127.0.0.1:8080"
    """Address of the gateway that the votes are given to."""
    api_key: SecretStr | None = None
    """Key that the gateway expects, where it expects one."""
    poll_s: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    """Time between two looks at the ratings."""
    state: Path = Path("var/open-webui.json")
    """File that says how far they were read."""


class LogSettings(Section):
    """The event log between gateway and joiner."""

    kind: Literal["embedded", "kafka"] = "embedded"
    """`embedded` is a SQLite file for one machine; `kafka` is a broker."""
    path: Path = Path("var/log.db")
    """File of the embedded log."""
    bootstrap_servers: list[str] = ["127.0.0.1:9092"]
    """Kafka brokers."""
    partitions: Annotated[int, Field(ge=1, le=1024)] = 4
    """Partitions of each topic, when it is made."""
    replication_factor: Annotated[int, Field(ge=1, le=9)] = 1
    """Kafka replicas of each partition, when a topic is made."""
    min_insync_replicas: Annotated[int, Field(ge=1, le=9)] = 1
    """Replicas that must have a record before it counts as written (`min.insync.replicas`), when a topic is made."""
    max_message_bytes: Annotated[int, Field(ge=64 * 1024, le=32 * 1024 * 1024)] = 8 * 1024 * 1024
    """Largest record that is sent to Kafka, and `max.message.bytes` of a topic, when it is made."""
    responses_topic: str = "thumbwheel.responses"
    """Topic of ResponseLogged."""
    feedback_topic: str = "thumbwheel.feedback"
    """Topic of FeedbackGiven."""
    retention_s: Annotated[int, Field(ge=3600)] = 14 * 86_400
    """Age at which events leave the log."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How Kafka is spoken to."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    """SASL mechanism, where the protocol is SASL."""
    sasl_username: str | None = None
    """SASL user."""
    sasl_password: SecretStr | None = None
    """SASL password."""
    ssl_cafile: Path | None = None
    """Certificate authority of the brokers."""
    ssl_certfile: Path | None = None
    """Our certificate (PEM), where the brokers ask for one."""
    ssl_keyfile: Path | None = None
    """Private key of our certificate."""

    @model_validator(mode="after")
    def _writable(self) -> LogSettings:
        if self.min_insync_replicas > self.replication_factor:
            raise ValueError(
                f"log.min_insync_replicas is {self.min_insync_replicas} but log.replication_factor is "
                f"{self.replication_factor}: no record could ever be written; expected at most as many"
            )
        return self


class StoreSettings(Section):
    """Where joined state lives."""

    url: SecretStr = SecretStr("sqlite:///var/store.db")
    """SQLAlchemy URL: `sqlite:///FILE` or `postgresql+psycopg://USER:PASSWORD@HOST/DB`."""
    pool_size: Annotated[int, Field(ge=1, le=100)] = 5
    """Postgres connections of one process."""
    retention_s: Annotated[int, Field(ge=86_400)] = 30 * 86_400
    """Age at which responses that nobody rated leave the store, and votes whose response never came."""


class JoinerSettings(Section):
    """The consumer that joins responses with feedback."""

    group: str = "joiner"
    """Consumer group, and the name that positions are kept under."""
    batch_events: Annotated[int, Field(ge=1, le=50_000)] = 4_000
    """Most events joined in one transaction."""
    poll_timeout_s: Annotated[float, Field(gt=0, le=30)] = 0.5
    """Longest wait for new events."""
    metrics_port: Port = 9102
    """Port of /metrics."""


class SnapshotSettings(Section):
    """Which examples a night trains on, and which are held out."""

    dir: Path = Path("var/snapshots")
    """Folder of the snapshots."""
    window_days: Annotated[int, Field(ge=1, le=3650)] = 30
    """Age of the oldest example that a night reads."""
    min_labels: Annotated[int, Field(ge=1)] = 500
    """Fewest labelled examples to start a run with; below, the run is skipped."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of raters, of conversations and of prompt clusters that are held out."""
    salt: str = "thumbwheel"
    """Salt of the hashes that assign the split; changing it makes a new split."""
    near_duplicate_similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity of word shingles from which prompts are one cluster."""
    disagreement: Literal["drop", "majority"] = "majority"
    """What becomes of examples whose raters disagree; a tie is always dropped."""
    max_per_rater: Annotated[int, Field(ge=1)] | None = 200
    """Most training examples of one rater; none for no limit."""
    max_per_prompt: Annotated[int, Field(ge=1)] | None = 50
    """Most training examples of one exact prompt; none for no limit."""
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    """Longest example in tokens; none for no limit."""
    allow_untokenized: bool = True
    """Whether examples without served token ids (imported, redacted) are used, through the chat template."""
    desirable_weight: Annotated[float, Field(ge=0, le=100)] | Literal["balance"] = "balance"
    """λ_D; `balance` chooses it with λ_U so that λ_D·n_D / (λ_U·n_U) lies in the paper's range."""
    undesirable_weight: Annotated[float, Field(ge=0, le=100)] | Literal["balance"] = "balance"
    """λ_U."""
    processes: Annotated[int, Field(ge=1, le=64)] = 2
    """Processes that read a large window side by side, of 0.3 GB each."""


class TrainSettings(Section):
    """KTO on a QLoRA adapter. Names are those of TRL and Transformers."""

    dir: Path = Path("var/adapters")
    """Folder of the adapters."""
    objective: Literal["kto", "apo_zero_unpaired"] = "kto"
    """The loss: KTO, or APO-zero for unpaired rows (KTO with z0 = 0: no mismatched passes, no pull to the base)."""
    beta: Annotated[float, Field(gt=0, le=10)] = 0.1
    """β of KTO: how far the policy may go from the reference."""
    desirable_weight: Annotated[float, Field(ge=0, le=100)] | Literal["balance"] = "balance"
    """λ_D for rows without a weight of their own; `balance`: by the numbers of both labels, in the paper's range."""
    undesirable_weight: Annotated[float, Field(ge=0, le=100)] | Literal["balance"] = "balance"
    """λ_U for rows without a weight of their own; `balance`: as above."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Schedule after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient norm that steps are clipped to."""
    num_train_epochs: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Passes over the data."""
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rows in one micro-batch."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    """Micro-batches in one optimiser step."""
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes that share every step, one for each GPU of this machine; the effective batch grows with them."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest row in tokens (prompt and completion)."""
    truncation: Literal["drop", "keep_end", "keep_start"] = "drop"
    """What becomes of longer rows: `drop` leaves them out, `keep_end` cuts the prompt's beginning, `keep_start` the
    completion's end; all are counted."""
    quantization: Literal["nf4", "none"] = "nf4"
    """The base's weights in training: bitsandbytes NF4 with double quantisation, or as they are."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; adapters are always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    lora_r: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of the adapter."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale of the adapter (alpha / r multiplies it)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, in training."""
    lora_target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Modules that get an adapter."""
    chat_template: str | None = None
    """Jinja chat template, or a file of one, for models that bring none."""
    logging_steps: Annotated[int, Field(ge=1)] = 1
    """Optimiser steps between two lines of metrics."""
    save_steps: Annotated[int, Field(ge=1)] = 50
    """Optimiser steps between two checkpoints."""
    validation_share: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the raters whose rows are watched and not trained on, for early stop and sweeps."""
    eval_steps: Annotated[int, Field(ge=1)] = 20
    """Optimiser steps between two looks at the validation rows."""
    early_stopping_patience: Annotated[int, Field(ge=0)] = 0
    """Looks without a lower validation loss after which training stops; the best look's adapter stays. 0: never."""
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Where metrics go besides the run's own files."""
    cache: Path | None = None
    """Folder in which reference log-probs are kept across nights; none: every night computes all of them."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of data order, LoRA's initialisation and dropout."""
    deadline_s: Seconds = 6 * 3600.0
    """Longest time that a night's training may take."""


class GateSettings(Section):
    """What a candidate must pass."""

    min_clusters: Annotated[int, Field(ge=2)] = 30
    """Fewest held-out raters (or conversations); below, the verdict is `insufficient`."""
    min_rows_per_label: Annotated[int, Field(ge=1)] = 50
    """Fewest held-out rows of either label; below, the verdict is `insufficient`."""
    bootstrap_samples: Annotated[int, Field(ge=100, le=100_000)] = 2_000
    """Resamples of the cluster bootstrap."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence of every interval."""
    min_preference_gain: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """The lower bound of candidate minus live in balanced accuracy must be above this."""
    max_kl_to_base: Annotated[float, Field(gt=0)] = 20.0
    """Largest mean KL to the base over held-out answers, in nats a sequence, on its upper bound."""
    max_length_ratio: Annotated[float, Field(gt=1)] = 2.0
    """Largest ratio, either way, of the candidate's median reply length to the live one's."""
    benchmark_tasks: list[str] = []
    """lm-eval task names."""
    benchmark_dir: Path | None = None
    """Folder of more lm-eval task files (YAML with local data files)."""
    benchmark_limit: Annotated[int, Field(ge=1)] | None = None
    """Most documents of one task; none for all."""
    max_benchmark_regression: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Largest drop of a task's metric from live to candidate; counts only where live beats chance."""
    max_serve_skew_nats: Annotated[float, Field(gt=0)] = 0.05
    """Largest mean absolute difference a token between the engine's and the trainer's log-probs of served answers."""
    max_quantization_shift_nats: Annotated[float, Field(gt=0)] = 0.5
    """Largest mean absolute difference a token between the candidate on NF4 and on the base as it is served."""
    probe_prompts: Annotated[int, Field(ge=1, le=10_000)] = 32
    """Held-out prompts that the engine answers for length and serve skew."""
    probe_max_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest probe answer, in tokens."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows scored at a time."""


class RolloutSettings(Section):
    """How a candidate takes over the traffic, and when it is taken back."""

    canary_steps: list[Annotated[float, Field(gt=0, lt=1)]] = [0.1, 0.5]
    """Shares of the traffic that the canary takes, one after the other, before it is live; none goes live at once."""
    canary_step_s: Seconds = 3600.0
    """Shortest time on each step."""
    canary_min_votes: Annotated[int, Field(ge=0)] = 50
    """Fewest votes on the canary's answers before a step ends."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """False-alarm rate of the sequential test over its whole life, however often it is looked at."""
    min_drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drop of the thumbs-up share that is tolerated."""
    watch_s: Seconds = 86_400.0
    """How long a new live adapter is watched against its predecessor's last votes."""
    drain_timeout_s: Seconds = 30.0
    """Longest wait for gateways to acknowledge a route and for open requests to end."""
    keep_loaded: Annotated[int, Field(ge=1, le=64)] = 2
    """Adapters kept loaded: the live one and its predecessors, for an instant way back."""


class SchedulerSettings(Section):
    """The clock."""

    cron: str = "0 3 * * *"
    """When the nightly run starts, as a crontab line; minutes, hours, days, months, weekdays."""
    timezone: str = "UTC"
    """Time zone of the crontab line."""
    runs_dir: Path = Path("var/runs")
    """Folder of the runs' files and reports."""
    lease_s: Annotated[float, Field(ge=2, le=3600)] = 60.0
    """How long a run's lease lives without a heartbeat."""
    tick_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """How often requested runs, the rollout and the engine's adapters are looked at."""
    metrics_port: Port = 9103
    """Port of /metrics."""


class ConsoleSettings(Section):
    """Operator pages, for API keys with the scope admin."""

    host: str = "127.0.0.1"
    """Address to listen on; loopback only, as long as there is no API key."""
    port: Port = 8090
    """Port."""
    gateway_url: str | None = None
    """Where the playground finds the gateway, without /v1; none for gateway.port on this machine."""


class Settings(Section):
    """The whole tree, one section for each part."""

    engine: EngineSettings = EngineSettings()
    gateway: GatewaySettings = GatewaySettings()
    langfuse: LangfuseSettings = LangfuseSettings()
    open_webui: OpenWebuiSettings = OpenWebuiSettings()
    log: LogSettings = LogSettings()
    store: StoreSettings = StoreSettings()
    joiner: JoinerSettings = JoinerSettings()
    snapshot: SnapshotSettings = SnapshotSettings()
    train: TrainSettings = TrainSettings()
    gate: GateSettings = GateSettings()
    rollout: RolloutSettings = RolloutSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    console: ConsoleSettings = ConsoleSettings()

    @model_validator(mode="after")
    def _tokens_hold_in_every_process(self) -> Settings:
        if self.gateway.processes > 1 and self.gateway.token_secret is None:
            raise ValueError(
                f"gateway.processes is {self.gateway.processes} but gateway.token_secret is not set: each process "
                "would refuse the feedback tokens of the others; set a secret"
            )
        return self

    @model_validator(mode="after")
    def _store_keeps_what_the_log_has(self) -> Settings:
        if self.store.retention_s < self.log.retention_s:
            raise ValueError(
                f"store.retention_s is {self.store.retention_s}, less than log.retention_s = {self.log.retention_s}: "
                "a log that is read again would bring back what the store has let go; expected at least as much"
            )
        return self


def load_settings(path: Path | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """The effective tree: defaults, then the TOML file, then the environment.

    `path` None takes `THUMBWHEEL_SETTINGS`, else `thumbwheel.toml` in the working directory where there is one.
    Raises SettingsError, which names each offending key, its value and what was expected.
    """
    environment = os.environ if environment is None else environment
    named = path or (Path(environment["THUMBWHEEL_SETTINGS"]) if "THUMBWHEEL_SETTINGS" in environment else None)
    if named is not None and (not named.exists() or named.is_dir()):  # /dev/null is no regular file, and means none
        raise SettingsError(f"settings file {named} does not exist; give an existing TOML file")
    source = named or Path("thumbwheel.toml")
    tree: dict[str, Any] = {}
    if source.exists():
        try:
            tree = tomllib.loads(source.read_text())
        except tomllib.TOMLDecodeError as exc:
            raise SettingsError(f"settings file {source} is not TOML: {exc}") from exc
    for name, text in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX) and name != "THUMBWHEEL_SETTINGS":
            section, separator, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
            if not separator or section not in Settings.model_fields:
                raise SettingsError(f"{name}: unknown setting; expected {ENVIRONMENT_PREFIX}<SECTION>__<KEY>")
            branch = tree.setdefault(section, {})
            if not isinstance(branch, dict):
                raise SettingsError(f"{section}: {branch!r} is not a table; write [{section}] above its keys")
            branch[key] = _parse(text)
    try:
        return Settings.model_validate(tree)
    except ValidationError as exc:
        raise SettingsError("\n".join(_explain(error) for error in exc.errors())) from exc


def _parse(text: str) -> Any:
    """Lists and null are JSON in the environment; anything else is text, which the field's type turns into a value."""
    if text != "null" and not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "settings"
    if error["type"] == "extra_forbidden":
        return f"{key} = {error['input']!r}: unknown key; `thumbwheel settings` prints the known ones"
    if error["type"] == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    value = "(secret)" if _is_secret(error["loc"]) else repr(error["input"])
    return f"{key} = {value}: {error['msg']}"


def _is_secret(location: tuple[Any, ...]) -> bool:
    """Whether the setting is of a secret type: then a refused value is not shown either."""
    section = Settings.model_fields[str(location[0])].annotation if location else None
    if len(location) < 2 or not (isinstance(section, type) and issubclass(section, Section)):
        return False
    field = section.model_fields.get(str(location[1]))
    return field is not None and "SecretStr" in repr(field.annotation)

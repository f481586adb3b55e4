"""Every Prometheus metric, declared once: `thumbwheel_<part>_<thing>_<unit>`, base units, no ids as labels.

Dashboards and alert rules may name only what stands here; a test holds it.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

# Gateway
gateway_requests = Counter(
    "thumbwheel_gateway_requests", "Requests answered, by endpoint, arm and status.", ["endpoint", "arm", "status"]
)
gateway_request_seconds = Histogram(
    "thumbwheel_gateway_request_seconds", "Time to the last byte.", ["endpoint", "arm"], buckets=_LATENCY_S
)
gateway_first_byte_seconds = Histogram(
    "thumbwheel_gateway_first_byte_seconds", "Time to the first byte.", ["endpoint", "arm"], buckets=_LATENCY_S
)
# Where several gateway processes share a port, a gauge says how those of all are one figure.
gateway_open_requests = Gauge(
    "thumbwheel_gateway_open_requests", "Requests open upstream now.", multiprocess_mode="livesum"
)
gateway_responses_logged = Counter("thumbwheel_gateway_responses_logged", "Responses written to the spool.", ["arm"])
gateway_responses_lost = Counter(
    "thumbwheel_gateway_responses_lost", "Responses served but not written to the spool in time.", ["reason"]
)
gateway_refused = Counter(
    "thumbwheel_gateway_refused", "Requests refused for their key, scope, rate or headers.", ["code"]
)
gateway_feedback = Counter("thumbwheel_gateway_feedback", "Feedback taken, by value and result.", ["value", "status"])
gateway_redactions = Counter(
    "thumbwheel_gateway_redactions", "Events that went through the redactor, by result.", ["result"]
)
gateway_spool_records = Gauge(
    "thumbwheel_gateway_spool_records",
    "Records in the spool that the log has not got yet.",
    multiprocess_mode="livesum",
)
gateway_route_generation = Gauge(
    "thumbwheel_gateway_route_generation", "Generation of the route in use.", ["alias"], multiprocess_mode="livemin"
)
gateway_route_retries = Counter(
    "thumbwheel_gateway_route_retries", "Requests tried again, for no engine had the adapter."
)

# Joiner
joiner_events = Counter("thumbwheel_joiner_events", "Events joined, by topic.", ["topic"])
joiner_batches = Counter("thumbwheel_joiner_batches", "Transactions committed or rolled back.", ["result"])
joiner_batch_seconds = Histogram("thumbwheel_joiner_batch_seconds", "Time of one batch, decoding and transaction.")
joiner_transaction_seconds = Histogram("thumbwheel_joiner_transaction_seconds", "Time of one batch's transaction.")
joiner_lag_records = Gauge(
    "thumbwheel_joiner_lag_records", "Records not joined yet, by topic and partition.", ["topic", "partition"]
)
joiner_lag_seconds = Gauge(
    "thumbwheel_joiner_lag_seconds", "Upper bound of the oldest such record's age.", ["topic", "partition"]
)
joiner_rebalances = Counter("thumbwheel_joiner_rebalances", "Changes of the partitions that a joiner owns.")
joiner_unseen_partitions = Gauge(
    "thumbwheel_joiner_unseen_partitions", "Partitions of ours that have no broker to lead them now.", ["topic"]
)
joiner_up = Gauge("thumbwheel_joiner_up", "Whether log and store answered when last asked.", ["part"])
joiner_votes = Counter("thumbwheel_joiner_votes", "New votes, by value.", ["value"])
joiner_unclear_votes = Counter(
    "thumbwheel_joiner_unclear_votes", "Votes that name none of a response's several choices: they make no example."
)
joiner_unstored_votes = Counter(
    "thumbwheel_joiner_unstored_votes", "Votes on responses that were not to be stored: they make no example."
)
joiner_duplicates = Counter("thumbwheel_joiner_duplicates", "Events seen before, by topic.", ["topic"])
joiner_stale_versions = Counter(
    "thumbwheel_joiner_stale_versions", "Later versions of responses that were joined already."
)
joiner_pending_votes = Gauge("thumbwheel_joiner_pending_votes", "Votes whose response was not seen yet.")
store_orphaned_votes = Counter(
    "thumbwheel_store_orphaned_votes", "Votes given up at the store's retention: their response never came."
)
joiner_pending_oldest_seconds = Gauge("thumbwheel_joiner_pending_oldest_seconds", "Age of the oldest such vote.")
joiner_dead_letters = Counter("thumbwheel_joiner_dead_letters", "Events that broke the contract, by topic.", ["topic"])
joiner_unsent_dead_letters = Gauge(
    "thumbwheel_joiner_unsent_dead_letters", "Dead letters in the store that their `.dlt` has not taken yet."
)

# Scheduler: the nightly run
scheduler_runs = Counter("thumbwheel_scheduler_runs", "Runs that ended, by state.", ["state"])
scheduler_run_seconds = Gauge("thumbwheel_scheduler_run_seconds", "Time of the last run that ended.")
scheduler_stage_seconds = Gauge("thumbwheel_scheduler_stage_seconds", "Time of a stage in the last run.", ["stage"])
scheduler_last_success_timestamp_seconds = Gauge(
    "thumbwheel_scheduler_last_success_timestamp_seconds", "When a run last ended with the state `done`."
)
scheduler_next_run_timestamp_seconds = Gauge(
    "thumbwheel_scheduler_next_run_timestamp_seconds", "When the clock starts the next run."
)
snapshot_examples = Gauge("thumbwheel_snapshot_examples", "Examples of the last snapshot.", ["split", "label"])
train_loss = Gauge("thumbwheel_train_loss", "Loss of the last training step.")
train_kl = Gauge("thumbwheel_train_kl_nats", "z0 of the last training step.")
train_rows_per_second = Gauge("thumbwheel_train_rows_per_second", "Rows a second of the training in progress.")
gate_value = Gauge("thumbwheel_gate_check_value", "Value of each check of the last gate.", ["check"])
gate_verdicts = Counter("thumbwheel_gate_verdicts", "Verdicts of gates.", ["verdict"])

# Scheduler: the rollout
rollout_live_version = Gauge(
    "thumbwheel_rollout_live_version", "Number of the live version, 0 for the base.", ["alias"]
)
rollout_canary_share = Gauge("thumbwheel_rollout_canary_share_ratio", "Share of the traffic on the canary.", ["alias"])
rollout_thumbs_up_share = Gauge("thumbwheel_rollout_thumbs_up_share_ratio", "Thumbs up of all thumbs.", ["arm"])
rollout_votes = Gauge("thumbwheel_rollout_votes", "Thumbs since the route was set.", ["arm"])
rollout_e_value = Gauge(
    "thumbwheel_rollout_e_value", "Evidence that the new adapter is worse; 1 / alpha rolls it back."
)
rollout_swaps = Counter("thumbwheel_rollout_swaps", "Route changes, by kind.", ["kind"])
rollout_swap_seconds = Histogram("thumbwheel_rollout_swap_seconds", "Time of a swap, loading included.")
rollout_reloads = Counter("thumbwheel_rollout_reloads", "Adapters loaded again into an engine that had lost them.")
engine_up = Gauge("thumbwheel_engine_up", "Whether the engine answers its health check.", ["engine"])

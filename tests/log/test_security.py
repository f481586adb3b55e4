"""SASL and TLS against a real Apache Kafka that asks for them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from loop.log import LogUnavailableError, NewRecord, Record
from loop.log.open import open_log
from loop.settings import LogSettings
from tests.conftest import wait_until
from tests.ports import free_ports
from tests.services_real import RealKafka

PROTOCOLS = ("SASL_PLAINTEXT", "SASL_SSL", "SSL")
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
LOGIN = "org.apache.kafka.common.security"


@pytest.fixture(scope="module")
def broker(apache_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealKafka]:
    """One broker with a listener for each protocol; the user is `app`, the password `secret`."""
    folder = tmp_path_factory.mktemp("secured")
    make_certificates(folder, "broker", "client")
    properties: dict[str, object] = {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": folder / "broker.pem",
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": folder / "ca.crt",
        "listener.name.ssl.ssl.client.auth": "required",
        "sasl.enabled.mechanisms": ",".join(MECHANISMS),
    }
    for listener in ("sasl_plaintext", "sasl_ssl"):
        stem = f"listener.name.{listener}"
        properties[f"{stem}.plain.sasl.jaas.config"] = f'{LOGIN}.plain.PlainLoginModule required user_app="secret";'
        for mechanism in ("scram-sha-256", "scram-sha-512"):
            properties[f"{stem}.{mechanism}.sasl.jaas.config"] = f"{LOGIN}.scram.ScramLoginModule required;"
    scram = [x for m in MECHANISMS[1:] for x in ("--add-scram", f"{m}=[name=app,password=secret]")]
    listeners = dict(zip(PROTOCOLS, free_ports(3), strict=True))
    started = RealKafka(apache_home, folder, listeners=listeners, properties=properties, format_arguments=tuple(scram))
    try:
        started.start()
        yield started
    finally:
        started.stop(kill=True)


def make_certificates(folder: Path, *names: str) -> None:
    """A certificate authority of our own, ca.crt, and for each name a key and what it signed: .key, .crt, .pem."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=180)

    key = ("-newkey", "rsa:2048", "-nodes", "-keyout")
    openssl("req", "-x509", *key, "ca.key", "-out", "ca.crt", "-subj", "/CN=Test authority", "-days", "2")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in names:
        openssl("req", *key, f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.crt", *signed)
        (folder / f"{name}.pem").write_text((folder / f"{name}.key").read_text() + (folder / f"{name}.crt").read_text())


def settings_for(broker: RealKafka, protocol: str, mechanism: str | None, **changes: object) -> LogSettings:
    secrets: dict[str, object] = {"bootstrap_servers": [f"127.0.0.1:{broker.listeners[protocol]}"]}
    if mechanism is not None:
        secrets |= {"sasl_mechanism": mechanism, "sasl_username": "app", "sasl_password": "secret"}
    if protocol.endswith("SSL"):
        secrets["ssl_cafile"] = broker.folder / "ca.crt"
    if protocol == "SSL":
        secrets |= {"ssl_certfile": broker.folder / "client.crt", "ssl_keyfile": broker.folder / "client.key"}
    return broker.settings(security_protocol=protocol, **(secrets | changes))


WAYS = [*((protocol, m) for protocol in ("SASL_PLAINTEXT", "SASL_SSL") for m in MECHANISMS), ("SSL", None)]


@pytest.mark.parametrize(("protocol", "mechanism"), WAYS)
def test_the_log_works_over(broker: RealKafka, protocol: str, mechanism: str | None) -> None:
    settings = settings_for(broker, protocol, mechanism)
    log = open_log(settings)
    log.append([NewRecord(settings.feedback_topic, "k", b"v")])
    assert sum(log.end_offsets(settings.feedback_topic).values()) == 1
    consumer = log.consumer("readers", [settings.feedback_topic])
    read: list[Record] = []
    wait_until(lambda: bool(read.extend(consumer.poll(10, 0.2)) or read), "read")
    consumer.close()
    log.close()
    assert [record.value for record in read] == [b"v"]


WRONG = {
    "a wrong password": ("SASL_PLAINTEXT", "PLAIN", {"sasl_password": "wrong"}),
    "a wrong password, salted": ("SASL_SSL", "SCRAM-SHA-512", {"sasl_password": "wrong"}),
    "a user that is not there": ("SASL_PLAINTEXT", "SCRAM-SHA-256", {"sasl_username": "nobody"}),
    "brokers of an unknown authority": ("SASL_SSL", "PLAIN", {"ssl_cafile": None}),
    "no certificate of ours": ("SSL", None, {"ssl_certfile": None, "ssl_keyfile": None}),
}


@pytest.mark.parametrize(("protocol", "mechanism", "changes"), WRONG.values(), ids=WRONG.keys())
def test_what_the_brokers_refuse_is_told_with_the_settings_to_look_at(
    broker: RealKafka, protocol: str, mechanism: str | None, changes: dict[str, object]
) -> None:
    settings = settings_for(broker, protocol, mechanism, **changes)
    with pytest.raises(LogUnavailableError, match=r"127\.0\.0\.1.*log\.security_protocol.*sasl_password.*ssl_cafile"):
        open_log(settings)

"""The operator's list of hosts: strict, atomic, private."""

import json
import os
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unsealerd.errors import (
    AccessDenied,
    BadRequest,
    ConfigInvalid,
    HostUnknown,
    HostUnreachable,
    IdentityInvalid,
    StorageFailed,
)
from unsealerd.gateway.identity import _generate
from unsealerd.operator.events import Event, HostsExposed
from unsealerd.operator.hosts import (
    Host,
    Hosts,
    Trust,
    default_path,
    fetch_certificate,
    make_host,
    parse_address,
)

CERTIFICATE = _generate().certificate.decode()
OTHER = _generate().certificate.decode()


def host(name: str = "server", address: str = "server.example:8750", certificate: str = CERTIFICATE) -> Host:
    return make_host(name, address, certificate, added=1_750_000_000)


def test_a_host_that_was_added_is_found_by_name_and_by_address(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path / "new" / "hosts.json")
    assert hosts.list() == ()
    hosts.add(host())
    hosts.add(host("other", "[2001:db8::1]:8750", OTHER))
    again = Hosts(tmp_path / "new" / "hosts.json")
    assert [each.name for each in again.list()] == ["other", "server"]
    assert again.find("server") == again.find("server.example:8750") == host()
    assert again.find("[2001:db8::1]:8750").name == "other"
    assert host().trust is Trust.TLS


def test_a_host_that_was_not_added_is_unknown(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path / "hosts.json")
    with pytest.raises(HostUnknown):
        hosts.find("server")
    with pytest.raises(HostUnknown):
        hosts.remove("server")


def test_a_host_can_be_removed(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path / "hosts.json")
    hosts.add(host())
    hosts.add(host("other", "other:1", OTHER))
    assert hosts.remove("server") == host()
    assert [each.name for each in hosts.list()] == ["other"]


@pytest.mark.parametrize("second", [host(address="other:1"), host("other")], ids=["name", "address"])
def test_a_host_is_never_replaced(tmp_path: Path, second: Host) -> None:
    hosts = Hosts(tmp_path / "hosts.json")
    hosts.add(host())
    with pytest.raises(BadRequest):
        hosts.add(second)
    assert hosts.list() == (host(),)


def test_the_file_is_the_operators_alone(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path / "private" / "hosts.json")
    hosts.add(host())
    assert stat.S_IMODE(hosts.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(hosts.path.parent.stat().st_mode) == 0o700
    assert os.listdir(hosts.path.parent) == ["hosts.json"]


def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = Hosts(tmp_path / "hosts.json")
    hosts.add(host())

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFailed):
        hosts.add(host("other", "other:1", OTHER))
    assert hosts.list() == (host(),)
    assert os.listdir(tmp_path) == ["hosts.json"]


def test_the_file_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSEALERD_HOSTS", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert default_path() == tmp_path / ".config/unsealerd/hosts.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert default_path() == tmp_path / ".config/unsealerd/hosts.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/xdg")
    assert default_path() == Path("/xdg/unsealerd/hosts.json")
    monkeypatch.setenv("UNSEALERD_HOSTS", "/chosen.json")
    assert default_path() == Path("/chosen.json")


# --- strict reading


def changed(**fields: object) -> bytes:
    entry = {**json.loads(msgspec.json.encode(host())), **fields}
    return json.dumps({"version": 1, "hosts": [entry]}).encode()


GOOD = changed()
INVALID: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": GOOD.replace(b"server", b"\xff\xff", 1),
    "nested": b"[" * 5000,
    "deep": b'{"version": 1, "hosts": [], "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "another version": GOOD.replace(b'"version": 1', b'"version": 2'),
    "unknown field": changed(more=1),
    "missing field": b'{"version": 1, "hosts": [{"name": "x"}]}',
    "unknown trust": changed(trust="blind"),
    "no trust": changed(trust=None),
    "bad name": changed(name="\x1b[2J"),
    "bad address": changed(address="nowhere"),
    "another fingerprint": changed(tls_fingerprint="00" * 32),
    "no certificate": changed(certificate="x"),
    "twice": json.dumps({"version": 1, "hosts": json.loads(GOOD)["hosts"] * 2}).encode(),
}


@pytest.mark.promise(10)
@pytest.mark.parametrize("data", INVALID.values(), ids=INVALID.keys())
def test_a_file_that_is_not_a_list_of_hosts_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "hosts.json"
    path.write_bytes(data)
    with pytest.raises(ConfigInvalid):
        Hosts(path).list()
    with pytest.raises(ConfigInvalid):
        Hosts(path).add(host("another", "another:1", OTHER))
    assert path.read_bytes() == data, "what cannot be read is not overwritten"


def test_the_sample_that_the_others_are_made_from_is_read(tmp_path: Path) -> None:
    (tmp_path / "hosts.json").write_bytes(GOOD)
    assert Hosts(tmp_path / "hosts.json").list() == (host(),)


@pytest.mark.promise(10)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_a_list_of_hosts_or_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "hosts.json"
    path.write_bytes(data)
    with pytest.raises(ConfigInvalid):
        Hosts(path).list()


def test_a_directory_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid):
        Hosts(tmp_path).list()


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_arguments: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(AccessDenied):
        Hosts(tmp_path / "hosts.json").list()


# --- addresses and entries


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("server.example:8750", ("server.example", 8750)),
        ("192.0.2.1:1", ("192.0.2.1", 1)),
        ("[2001:db8::1]:65535", ("2001:db8::1", 65535)),
        ("[fe80::1%eth0]:8750", ("fe80::1%eth0", 8750)),
    ],
)
def test_an_address_has_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "server",
        "server:",
        ":8750",
        "server:0",
        "server:65536",
        "2001:db8::1:8750",
        "[::1]",
        "a b:1",
        "x:1\n",
        "x:\u0661",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        parse_address(text)
    with pytest.raises(BadRequest):
        fetch_certificate(text)


@pytest.mark.parametrize("name", ["", "-x", "a/b", "a b", "x" * 65, "ü"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        host(name)


def test_what_is_no_certificate_is_refused() -> None:
    with pytest.raises(IdentityInvalid):
        host(certificate="-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----")


def test_a_host_without_a_server_has_no_certificate() -> None:
    with pytest.raises(HostUnreachable):
        fetch_certificate("nowhere.invalid:8750", seconds=5)


@pytest.mark.promise(5)
def test_who_may_write_the_file_decides_whom_the_operator_answers(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    Hosts(path).add(host())
    told: list[Event] = []
    hosts = Hosts(path, told.append)
    hosts.list()
    assert told == []
    for mode in (0o660, 0o602):
        path.chmod(mode)
        hosts = Hosts(path, told.append)
        hosts.list()
        hosts.find(host().name)
        assert told == [HostsExposed(path, mode)]  # once
        told.clear()


@pytest.mark.promise(5)
def test_another_users_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    Hosts(path).add(host())
    os.chown(path, 65533, -1)
    with pytest.raises(AccessDenied, match="uid 65533"):
        Hosts(path).find(host().name)

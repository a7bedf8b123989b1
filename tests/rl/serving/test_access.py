"""Who may ask, and where the service may listen."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rl.errors import ConfigError, ServiceError
from rl.serving.access import Access, check_address, is_loopback, read_token

TOKEN = "0123456789abcdef-token"


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    monkeypatch.delenv("FLOWGRAPH_RL_TOKEN", raising=False)
    assert read_token(None) is None
    assert read_token(path) == TOKEN
    monkeypatch.setenv("FLOWGRAPH_RL_TOKEN", "another-token-of-the-environment")
    assert read_token(None) == "another-token-of-the-environment"
    assert read_token(path) == TOKEN


@pytest.mark.parametrize("text", ["", "short", "with a space in its middle", "umlauts-äöü-0123456789"])
def test_a_weak_token_is_refused_without_being_shown(tmp_path: Path, text: str):
    path = tmp_path / "token"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"token: must be at least 16 printable ASCII .*, got \d+ in .*; python"
    ) as told:
        read_token(path)
    assert not text or text not in str(told.value)


def test_a_missing_token_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"token-file: must be a text file that can be read, got .*none \(FileNot.*;"):
        read_token(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "example.org"])
def test_without_a_token_only_loopback_is_served(host: str):
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match=r"host: must be a loopback address without a token, got '.*'; give --token"):
        check_address(host, 8000, None)


def test_a_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"port: must be free on the host, got 127.0.0.1:{port} \(.*use\); choose"
        ):
            check_address("127.0.0.1", port, None)
    check_address("127.0.0.1", port, None)
    with pytest.raises(ConfigError, match=r"port: must be from 1 to 65535, got 65536; 8000"):
        check_address("127.0.0.1", 65536, None)


@pytest.mark.parametrize(
    ("header", "got"),
    [
        ({}, "none"),
        ({"authorization": "Bearer "}, "none"),
        ({"authorization": "Bearer wrong"}, "another one"),
        ({"authorization": f"Basic {TOKEN}"}, "another one"),
        ({"authorization": f"Bearer {TOKEN}x"}, "another one"),
        ({"authorization": f"Bearer {TOKEN[:-1]}"}, "another one"),
        ({"authorization": "Bearer \udcff"}, "another one"),
    ],
)
def test_a_wrong_token_is_refused(header: dict[str, str], got: str):
    access = Access(Access.digest_of(TOKEN))
    access.check({"authorization": f"bearer {TOKEN}"})
    with pytest.raises(ServiceError, match=f"token: must be that of the service, got {got}; send the header") as told:
        access.check(header)
    assert told.value.status == 401
    assert TOKEN not in str(told.value)


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST", ""])
def test_without_a_token_this_machine_may_ask(host: str):
    Access(None).check({"host": host})


@pytest.mark.parametrize("host", ["evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1"])
def test_without_a_token_another_name_is_refused(host: str):
    """A page in a browser may resolve its own name to this machine."""
    with pytest.raises(ServiceError, match=r"Host: must be localhost or .* without a token, got '.*'; start") as told:
        Access(None).check({"host": host})
    assert told.value.status == 403

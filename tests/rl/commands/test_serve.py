"""`flowgraph-rl serve` refuses bad input before Ray is started."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

from flowgraph import MissingExtraError
from rl.errors import CheckpointError, ConfigError, CreditError
from rl.serving import ray_deployment
from rl.serving.ray_deployment import ServiceSettings
from tests.fixtures.rl_commands import invoke
from tests.fixtures.serving import write_adapter


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServiceSettings]:
    """The settings that Ray would be started with."""
    found: list[ServiceSettings] = []
    monkeypatch.setattr(ray_deployment, "require_ray", lambda: None)
    monkeypatch.setattr(ray_deployment, "run_service", lambda settings, announce: found.append(settings))
    monkeypatch.delenv("FLOWGRAPH_RL_TOKEN", raising=False)
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(*arguments: object) -> None:
    """Run the command on a free port; errors of the package stay exceptions."""
    from rl.cli import app

    words = ["serve", "--model", "program", "--port", str(free_port()), *map(str, arguments)]
    app(words, standalone_mode=False)


def test_the_settings_reach_the_service(started: list[ServiceSettings], tmp_path: Path):
    folder = write_adapter(tmp_path / "1", seed=1)
    (tmp_path / "token").write_text("0123456789abcdef-token\n")
    serve(
        "--rules", "flow:soft:floor=0.5,reach_sharp", "--adapter", folder, "--adapter-version", 12, "--adapter-root",
        tmp_path, "--host", "0.0.0.0", "--replicas", 2, "--max-batch-tokens", 100, "--max-wait-ms", 2, "--max-queue", 3,
        "--max-tokens", 50, "--max-sequences", 4, "--max-body-bytes", 1000, "--token-file", tmp_path / "token",
        "--task", "program",
    )  # fmt: skip
    (settings,) = started
    assert [*settings.rules] == ["flow", "reach_sharp"]
    assert (settings.rules["flow"].shape, settings.rules["flow"].floor) == ("soft", 0.5)
    assert (settings.adapter, settings.adapter_version, settings.adapter_root) == (folder, "12", tmp_path)
    assert (settings.host, settings.replicas, settings.task) == ("0.0.0.0", 2, "program")
    limits = settings.limits
    assert (limits.max_batch_tokens, limits.max_wait_ms, limits.max_queue) == (100, 2.0, 3)
    assert (limits.max_tokens, limits.max_sequences, limits.max_body_bytes) == (50, 4, 1000)
    # The token itself does not leave this process.
    assert "0123456789abcdef" not in repr(settings)


def test_the_default_rule_is_the_recommended_one(started: list[ServiceSettings]):
    from rl.config import CreditConfig

    serve()
    assert started[0].rules == {"reach_sharp": CreditConfig.recommended()}
    assert (started[0].host, started[0].token_digest) == ("127.0.0.1", None)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["--rules", "flw"], CreditError, r"credit: must name a registered rule, got 'flw'; there are"),
        (
            ["--rules", "delta"],
            CreditError,
            r"credit: must be a rule that another trainer can serve, got 'delta', which",
        ),
        (["--rules", "flow,flow:soft"], ConfigError, r"rules: must name every rule once, got 'flow'; send"),
        (["--rules", ""], ConfigError, r"rules: must name at least one rule, got ''; reach_sharp"),
        (["--rules", "flow:share=nan"], ConfigError, r"share: must be float, got 'nan'; see"),
        (["--host", "0.0.0.0"], ConfigError, r"host: must be a loopback address without a token, got '0.0.0.0'; give"),
        (["--port", "0"], ConfigError, r"port: must be from 1 to 65535, got 0; 8000"),
        (["--replicas", "0"], ConfigError, r"replicas: must be at least 1, got 0; 1 is"),
        (["--max-queue", "0"], ConfigError, r"max_queue: must be at least 1, got 0; see"),
        (["--max-wait-ms", "nan"], ConfigError, r"max_wait_ms: must be finite, got nan; see"),
        (["--max-tokens", "1"], ConfigError, r"max_tokens: must be at least 2, got 1; see"),
        (["--adapter-version", "1"], ConfigError, r"adapter-version: must come with --adapter, got a version alone; g"),
        (
            ["--adapter", "none", "--adapter-version", "1"],
            CheckpointError,
            r"adapter: must be a run, a checkpoint or a",
        ),
        (["--adapter-root", "none"], ConfigError, r"adapter-root: must be a folder, got 'none'; create"),
        (["--token-file", "none"], ConfigError, r"token-file: must be a text file that can be read, got none"),
    ],
)
def test_bad_input_is_refused_before_ray_starts(
    started: list[ServiceSettings], arguments: list[str], error: type[Exception], text: str
):
    with pytest.raises(error, match=text):
        serve(*arguments)
    assert started == []


def test_an_adapter_without_a_version_is_refused(started: list[ServiceSettings], tmp_path: Path):
    folder = write_adapter(tmp_path / "1", seed=1)
    with pytest.raises(
        ConfigError, match=r"adapter-version: must come with --adapter, got an adapter alone; give both"
    ):
        serve("--adapter", folder)


def test_a_port_in_use_is_refused(started: list[ServiceSettings]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(
            ConfigError, match=r"port: must be free on the host, got 127.0.0.1:\d+ \(.*\); choose another"
        ):
            serve("--port", taken.getsockname()[1])


def test_without_ray_the_message_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec

    def without_ray(name: str, *arguments: Any) -> Any:
        return None if name == "ray" else find_spec(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", without_ray)
    with pytest.raises(
        MissingExtraError, match=r"serve: must have the package ray .*, got .* without it; pip install 'fl"
    ):
        serve()


def test_help_names_the_options():
    text = invoke("serve", "--help").output
    for option in ("--rules", "--max-batch-tokens", "--token-file", "--adapter-root"):
        assert option in text

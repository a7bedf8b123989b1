"""The service on Ray: a process that serves, refuses, loses a scorer, and stops gracefully."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rl.errors import ServiceError
from rl.integrations.engine_credit import EngineCredit
from rl.integrations.service import CreditClient
from tests.fixtures.engines import TOKENIZER, sequences
from tests.fixtures.policies import tiny_policy
from tests.fixtures.serving import SOFT, bodies, write_adapter

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[serve]")

TOKEN = "0123456789abcdef-token"
START_SECONDS = 240


class Service:
    """A running service: process, URL and the folder of its adapters."""

    def __init__(self, folder: Path, model: Path) -> None:
        (folder / "token").write_text(TOKEN)
        write_adapter(folder / "adapters" / "1", seed=1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        words = ["serve", "--model", str(model), "--rules", "reach_sharp:soft:floor=0.5,ceiling=2,fallback=0.5,flow"]
        words += [
            "--port",
            str(port),
            "--token-file",
            str(folder / "token"),
            "--adapter-root",
            str(folder / "adapters"),
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "rl.cli", *words], stdout=log, stderr=log)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "listening on" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def children(self, title: str) -> list[int]:
        """Processes of Ray with a title, below this service."""
        import psutil

        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            words = " ".join(process.cmdline())
            if "ServeReplica" in words and title in words:
                found.append(process.pid)
        return found


@pytest.fixture(scope="module")
def running(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"), saved_model)
    try:
        service.wait_until_ready()
        yield service
    finally:
        if service.process.poll() is None:
            service.process.send_signal(signal.SIGTERM)
            service.process.wait(120)


def assert_weights(found: list[list[float]]) -> None:
    local = EngineCredit(SOFT, tiny_policy(context=512), TOKENIZER).weigh(sequences()).weights
    for row, own in enumerate(found):
        torch.testing.assert_close(torch.tensor(own), local[row, : len(own)], rtol=1e-6, atol=1e-6)


def test_it_serves_survives_its_scorer_and_stops_gracefully(running: Service):
    client = CreditClient(running.url, TOKEN, timeout=120)
    assert_weights(client.weights(bodies()))

    # Refused requests, and a new policy.
    with pytest.raises(ServiceError, match="token: must be that of the service, got another one"):
        CreditClient(running.url, "wrong").weights(bodies())
    assert client.load_adapter("1", 1)["loaded"] == ["base", "1"]
    assert client.credit(bodies(), rule="flow")["adapter_version"] == "1"
    assert_weights(client.weights(bodies(), adapter_version="base"))

    # A scorer that is killed is replaced; a request meanwhile is answered, and the versions stay.
    (scorer,) = running.children(":scorer")
    os.kill(scorer, signal.SIGKILL)
    assert_weights(client.weights(bodies(), adapter_version="base"))
    assert client.credit(bodies(), rule="flow")["adapter_version"] == "1"

    # What was accepted before the stop is answered.
    answers: list[list[list[float]]] = []
    asking = threading.Thread(target=lambda: answers.append(client.weights(bodies(), adapter_version="base")))
    asking.start()
    time.sleep(0.2)
    running.process.send_signal(signal.SIGTERM)
    asking.join(120)
    assert_weights(answers[0])
    assert running.process.wait(120) == 0
    assert "Traceback" not in running.log.read_text()


def test_a_model_that_cannot_be_loaded_ends_with_its_message(tmp_path: Path):
    service = Service(tmp_path, tmp_path / "none")
    assert service.process.wait(START_SECONDS) == 2
    text = service.log.read_text()
    assert "flowgraph-rl: model: must be a folder or a name that transformers can load, got" in text
    assert "Traceback" not in text

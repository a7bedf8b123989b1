"""The client gets the server's weights and messages, and repeats what was lost without repeating the work."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.errors import ConfigError, CreditError, ServiceError
from rl.integrations import service as module
from rl.integrations.engine_credit import EngineCredit
from rl.integrations.service import CreditClient
from tests.fixtures.engines import DIGITS, TOKENIZER, sequences
from tests.fixtures.http_server import FaultyServer, serving
from tests.fixtures.policies import tiny_policy
from tests.fixtures.serving import SOFT, bodies, endpoints, scorer, service, write_adapter

TOKEN = "0123456789abcdef-token"


@pytest.fixture(scope="module")
def running(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FaultyServer, str]]:
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(root / "1", seed=1)
    with serving(endpoints(service(scorer(saved_model)), TOKEN, root)) as found:
        yield found


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    return pauses


def figure(text: str, name: str) -> float:
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"flowgraph_credit_{name} "))


def test_weights_are_those_of_the_local_computation(running: tuple[FaultyServer, str]):
    client = CreditClient(running[1], TOKEN)
    given = [
        {"ids": torch.tensor(body["ids"]), "prompt_length": body["prompt_length"], "reward": torch.tensor(0.0)}
        for body in bodies()
    ]
    found = client.weights(given, rule="reach_sharp")
    local = EngineCredit(SOFT, tiny_policy(context=512), TOKENIZER, find_answer=DIGITS.find_answer).weigh(sequences())
    for row, own in enumerate(found):
        torch.testing.assert_close(torch.tensor(own), local.weights[row, : len(own)], rtol=1e-6, atol=1e-6)
    assert client.health()["status"] == "ok"


def test_the_python_of_the_page_runs(running: tuple[FaultyServer, str]):
    text = (Path(__file__).parents[3] / "docs" / "service.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for written, own in (("http://127.0.0.1:8000", running[1]), ("the token", TOKEN)):
        assert written in block
        block = block.replace(written, own)
    given = sequences()[:2]
    names: dict[str, Any] = {
        "prompt_ids": given[0].prompt_ids,
        "responses": [sequence.response_ids for sequence in given],
    }
    exec(compile(block, "service.md", "exec"), names)
    assert [len(row) for row in names["weights"]] == [8, 3]


def test_a_lost_answer_is_asked_for_again_and_computed_once(running: tuple[FaultyServer, str], no_pauses: list[float]):
    server, url = running
    client = CreditClient(url, TOKEN)
    expected = client.weights(bodies()[:1])
    server.drop = 2
    before = server.num_requests
    text = server.endpoints.service.counters.text
    num_batches = figure(text(), "batches_total")
    assert client.weights(bodies()[:1]) == expected
    assert server.num_requests == before + 3
    assert no_pauses == [0.5, 1.0]
    assert figure(text(), "batches_total") == num_batches + 1
    assert figure(text(), "repeated_requests_total") == 2


def test_a_busy_service_is_asked_again_at_its_time(
    running: tuple[FaultyServer, str], no_pauses: list[float], monkeypatch: pytest.MonkeyPatch
):
    own = running[0].endpoints.service
    busy = [ServiceError("queue: full", status=429, retry_after=2.5), ServiceError("stopping", status=503)]
    credit = own.credit

    async def sometimes(body: Any) -> Any:
        if busy:
            raise busy.pop(0)
        return await credit(body)

    monkeypatch.setattr(own, "credit", sometimes)
    assert len(CreditClient(running[1], TOKEN).weights(bodies()[:1])) == 1
    assert no_pauses == [3.0, 1.0]
    busy += [ServiceError("queue: full", status=429, retry_after=1.0)] * 2
    with pytest.raises(ServiceError, match="queue: full") as told:
        CreditClient(running[1], TOKEN, attempts=2).weights(bodies()[:1])
    assert told.value.status == 429


def test_errors_of_the_server_are_ours_with_its_message(running: tuple[FaultyServer, str]):
    client = CreditClient(running[1], TOKEN)
    with pytest.raises(
        ConfigError, match=r"ids: must be integers in the vocabulary of 45 tokens, got 99 in sequence 0; u"
    ):
        client.weights([{"ids": [3, 99], "prompt_length": 1}])
    with pytest.raises(CreditError, match=r"credit.fallback: must be 0 with rule 'entropy'"):
        client.weights(bodies(), rule="entropy", options={"fallback": 0.5})
    with pytest.raises(ServiceError, match=r"token: must be that of the service, got another one; send") as told:
        CreditClient(running[1], "another token").weights(bodies())
    assert told.value.status == 401
    with pytest.raises(ServiceError, match=r"token: must be that of the service, got none; send"):
        CreditClient(running[1]).weights(bodies())


def test_an_adapter_is_loaded_by_its_version(running: tuple[FaultyServer, str]):
    client = CreditClient(running[1], TOKEN)
    assert client.load_adapter("1", 7)["loaded"] == ["base", "7"]
    assert client.credit(bodies())["adapter_version"] == "7"
    assert client.credit(bodies(), adapter_version="base")["adapter_version"] == "base"
    with pytest.raises(ServiceError, match=r"adapter_version: must be a version that is loaded, got '8'; loaded are"):
        client.credit(bodies(), adapter_version=8)


def test_a_service_that_cannot_be_reached(no_pauses: list[float]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        ServiceError, match=rf"service: must answer at {url}, got ConnectionRefused.* 3 attempts; check"
    ):
        CreditClient(url, attempts=3).health()
    assert no_pauses == [0.5, 1.0]


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://", "file:///etc/passwd"])
def test_an_invalid_address_is_refused(url: str):
    with pytest.raises(ConfigError, match=r"url: must be http://HOST:PORT or https://HOST:PORT, got '.*'; see"):
        CreditClient(url)


def test_settings_of_the_client_are_checked():
    with pytest.raises(ConfigError, match=r"timeout: must be positive, got 0; 120 seconds"):
        CreditClient("http://a", timeout=0)
    with pytest.raises(ConfigError, match=r"attempts: must be at least 1, got 0; 8 are"):
        CreditClient("http://a", attempts=0)


@pytest.mark.parametrize("value", [float("nan"), torch.tensor([float("inf")]), object(), {1, 2}])
def test_values_that_are_no_json_are_refused_before_they_are_sent(value: Any):
    with pytest.raises(ConfigError, match=r"sequences: must be finite numbers, text, lists and tensors, got .*; see"):
        CreditClient("http://127.0.0.1:1").weights([{"ids": [1, 2], "prompt_length": 1, "reward": value}])


def test_another_server_is_recognised(running: tuple[FaultyServer, str], monkeypatch: pytest.MonkeyPatch):
    client = CreditClient(running[1], attempts=1)
    monkeypatch.setattr(client, "_once", lambda *_: (502, {}, b"<html>bad gateway"))
    with pytest.raises(
        ServiceError, match=r"service: must answer with its own errors, got status 502 and b'<html>bad.*;"
    ):
        client.health()
    monkeypatch.setattr(client, "_once", lambda *_: (200, {}, b"<html>"))
    with pytest.raises(ServiceError, match=r"service: must answer JSON, got b'<html>' from http://.*; check"):
        client.health()

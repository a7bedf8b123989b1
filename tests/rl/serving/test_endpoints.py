"""The HTTP interface: statuses, headers and messages."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rl.serving.scorer import Scorer
from tests.fixtures.serving import JSON, ask, bodies, endpoints, run, scorer, service, write_adapter

TOKEN = "0123456789abcdef-token"


@pytest.fixture(scope="module")
def tiny(saved_model: Path) -> Scorer:
    return scorer(saved_model)


def test_a_request_for_credit(tiny: Scorer):
    async def work() -> None:
        of = endpoints(service(tiny))
        reply, answer = await ask(of, body={"sequences": bodies(), "request_id": "r"})
        assert reply.status == 200
        assert answer["request_id"] == "r"
        assert [len(sequence["weights"]) for sequence in answer["sequences"]] == [8, 3, 6, 9]
        assert answer["sequences"][0]["answer"] == {"found": "stated", "characters": [6, 7]}
        assert answer["sequences"][1]["answer"] == {"found": "none", "characters": None}
        _, answer = await ask(of, body={"prompt": "a=1;b=2;a?", "response": "a=1"})
        assert len(answer["sequences"][0]["weights"]) == len(answer["sequences"][0]["response_ids"]) == 3

    run(work)


def test_health_and_metrics(tiny: Scorer):
    async def work() -> None:
        of = endpoints(service(tiny), TOKEN)
        authorized = {"authorization": f"Bearer {TOKEN}"}
        await ask(of, body=bodies()[0], headers={**JSON, **authorized})
        await ask(of, body=b"{", headers={**JSON, **authorized})
        reply, health = await ask(of, "/health")
        assert (reply.status, health) == (200, {"status": "ok"})
        reply, health = await ask(of, "/health", headers=authorized)
        assert (health["rules"], health["adapter_version"]) == (["reach_sharp", "flow", "entropy"], "base")
        assert (await ask(of, "/metrics"))[0].status == 401
        reply, text = await ask(of, "/metrics", headers=authorized)
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert 'requests_total{path="/v1/credit",status="200"} 1' in text
        assert 'requests_total{path="/v1/credit",status="400"} 1' in text
        for line in text.splitlines():
            assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{[^{}]*\})? [0-9.e+-]+", line), line

    run(work)


REFUSED = [
    ({"path": "/v2"}, 404, "ServiceError", r"path: must be one of /v1/credit, .*, got '/v2'; see"),
    (
        {"path": "/v1/credit", "method": "GET"},
        405,
        "ServiceError",
        r"method: must be POST for /v1/credit, got 'GET'; see",
    ),
    ({"headers": {}}, 415, "ServiceError", r"Content-Type: must be application/json, got ''; set"),
    (
        {"headers": {"content-type": "text/plain"}},
        415,
        "ServiceError",
        r"Content-Type: must be .*, got 'text/plain'; set",
    ),
    ({"body": b"{"}, 400, "ConfigError", r"body: must be JSON in UTF-8, got .*; send"),
    ({"body": {"rule": "flw"}}, 400, "ConfigError", r"rule: must be one that this service offers, got 'flw'; it"),
    ({"body": b" " * 3000}, 413, "ServiceError", r"body: must have at most 2000 bytes, got more than 2000; send"),
    (
        {"headers": {**JSON, "content-length": "9999"}},
        413,
        "ServiceError",
        r"body: must have at most 2000 .*, got 9999; s",
    ),
    (
        {"headers": {**JSON, "host": "evil.example"}},
        403,
        "ServiceError",
        r"Host: must be localhost .*, got 'evil.example'",
    ),
    ({"path": "/v1/adapter", "body": {"path": "a"}}, 400, "ConfigError", r"version: must be given, got none; send"),
    (
        {"path": "/v1/adapter", "body": {"version": 1}},
        400,
        "ConfigError",
        r"path: must be the folder .*, got None; send",
    ),
    (
        {"path": "/v1/adapter", "body": {"x": 1}},
        400,
        "ConfigError",
        r"body: must hold known fields, got 'x'; there are",
    ),
    (
        {"path": "/v1/adapter", "body": {"path": "a", "version": 1}},
        403,
        "ServiceError",
        r"path: must lie below the folder of --adapter-root, got a service without one; start",
    ),
    (
        {"body": {**bodies()[0], "adapter_version": 5}},
        409,
        "ServiceError",
        r"adapter_version: must be a version that is loaded, got '5'; loaded are 'base', and POST",
    ),
    (
        {"body": {**bodies()[0], "answer": {"characters": [0, 99]}}},
        400,
        "ConfigError",
        r"sequences\[0\].answer: must lie within the response of 7 characters, got \[0, 99\]; count",
    ),
]


@pytest.mark.parametrize(("request_", "status", "kind", "text"), REFUSED)
def test_a_refused_request_has_its_status_and_message(
    tiny: Scorer, request_: dict[str, Any], status: int, kind: str, text: str
):
    async def work() -> None:
        of = endpoints(service(tiny, max_body_bytes=2000))
        reply, answer = await ask(of, **request_)
        assert reply.status == status
        assert answer["error"]["type"] == kind
        assert re.match(text, answer["error"]["message"]), answer

    run(work)


@pytest.mark.parametrize("header", [{}, {"authorization": "Bearer nope"}])
@pytest.mark.parametrize("path", ["/v1/credit", "/v1/adapter", "/metrics"])
def test_a_wrong_token_is_refused_before_the_body_is_read(tiny: Scorer, path: str, header: dict[str, str]):
    async def work() -> None:
        reply, answer = await ask(endpoints(service(tiny), TOKEN), path, b"{", headers={**JSON, **header})
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert answer["error"]["message"].startswith("token: must be that of the service, got")

    run(work)


def test_a_stopping_service_says_when_to_come_back(tiny: Scorer):
    async def work() -> None:
        own = service(tiny)
        of = endpoints(own)
        await own.drain()
        reply, _ = await ask(of, body=bodies()[0])
        assert (reply.status, reply.headers["retry-after"]) == (503, "5")
        assert (await ask(of, "/health"))[0].status == 503

    run(work)


def test_adapters_are_named_below_their_root_only(tiny: Scorer, tmp_path: Path):
    root = tmp_path / "root"
    write_adapter(root / "1", seed=1)
    write_adapter(tmp_path / "outside", seed=2)
    (root / "link").symlink_to(tmp_path / "outside")

    async def work() -> None:
        of = endpoints(service(tiny), root=root)
        for path in ("../outside", str(tmp_path / "outside"), "link", "1/../../outside"):
            reply, answer = await ask(of, "/v1/adapter", {"path": path, "version": 1})
            assert reply.status == 403
            assert re.match(r"path: must lie below .*, got '.*'; write adapters there", answer["error"]["message"])
        reply, answer = await ask(of, "/v1/adapter", {"path": "a\0b", "version": 1})
        assert reply.status == 400
        reply, answer = await ask(of, "/v1/adapter", {"path": "none", "version": 1})
        assert answer["error"]["type"] == "CheckpointError"
        for path in ("1", str(root / "1")):
            reply, answer = await ask(of, "/v1/adapter", {"path": path, "version": 1})
            assert (reply.status, answer["loaded"]) == (200, ["base", "1"])
        _, answer = await ask(of, body=bodies()[0])
        assert answer["adapter_version"] == "1"

    run(work)


def test_many_requests_at_once_are_all_answered(tiny: Scorer):
    async def work() -> None:
        of = endpoints(service(tiny))
        replies = await asyncio.gather(*[ask(of, body=body) for body in bodies() * 10])
        assert [reply.status for reply, _ in replies] == [200] * 40
        assert json.dumps(replies[0][1]["sequences"])

    run(work)

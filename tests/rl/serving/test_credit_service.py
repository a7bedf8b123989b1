"""Every accepted request is answered once: with a full queue, retries, lost scorers, new policies and a stop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flowgraph import FlowgraphError
from rl.errors import CheckpointError, ConfigError, ServiceError
from rl.serving import credit_service as module
from rl.serving.credit_service import LocalScorers, ScorerLostError
from rl.serving.scorer import Scorer, ScoringJob, ScoringOutcome
from tests.fixtures.serving import bodies, run, scorer, service, write_adapter


@pytest.fixture(scope="module")
def tiny(saved_model: Path) -> Scorer:
    return scorer(saved_model)


class Held(LocalScorers):
    """Scorers that wait until they are told to go on, and count what they score."""

    def __init__(self, of: Scorer) -> None:
        super().__init__(of)
        self.go_on = threading.Event()
        self.batches: list[int] = []
        self.lose = 0
        self.fail: Exception | None = None

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoringOutcome]:
        self.batches.append(len(jobs))
        while not self.go_on.is_set():
            await asyncio.sleep(0.001)
        if self.lose > 0:
            self.lose -= 1
            raise ScorerLostError("died")
        if self.fail is not None:
            raise self.fail
        return await super().score(jobs)


def weights(answer: dict[str, Any]) -> list[list[float]]:
    return [sequence["weights"] for sequence in answer["sequences"]]


async def alone(of: Scorer, body: dict[str, Any]) -> list[list[float]]:
    own = service(of)
    answer = await own.credit(body)
    await own.drain()
    return weights(answer)


def test_requests_are_batched_by_length_and_each_gets_its_own_answer(tiny: Scorer):
    async def work() -> None:
        scorers = Held(tiny)
        scorers.go_on.set()
        of = service(tiny, scorers=scorers, max_wait_ms=30)
        answers = await asyncio.gather(*[of.credit(body) for body in bodies() * 4])
        assert sum(scorers.batches) == 16
        assert len(scorers.batches) <= 4
        for body, answer in zip(bodies() * 4, answers, strict=True):
            for one, other in zip(weights(answer), await alone(tiny, body), strict=True):
                # Sharpened attention multiplies the rounding of float32.
                assert one == pytest.approx(other, rel=5e-6)
        assert len({answer["request_id"] for answer in answers}) == 16
        assert answers[0]["rule"] == "reach_sharp"
        assert (answers[0]["sign"], answers[0]["adapter_version"]) == ("all", "base")
        await of.drain()

    run(work)


def test_a_full_queue_refuses_with_a_time_to_come_back(tiny: Scorer):
    async def work() -> None:
        scorers = Held(tiny)
        of = service(tiny, scorers=scorers, max_queue=2, max_wait_ms=0)
        tasks = [asyncio.create_task(of.credit(bodies()[0]))]
        while not scorers.batches:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(of.credit(body)) for body in bodies()[:2]]
        await asyncio.sleep(0)
        assert (of.num_waiting, of.num_open) == (2, 3)
        with pytest.raises(
            ServiceError, match=r"queue: must hold fewer than 2 requests, got 2 waiting; try again"
        ) as told:
            await of.credit(bodies()[0])
        assert told.value.status == 429
        assert told.value.retry_after >= 1
        scorers.go_on.set()
        assert len(await asyncio.gather(*tasks)) == 3
        await of.credit(bodies()[0])
        await of.drain()

    run(work)


def test_a_retry_is_the_same_request(tiny: Scorer):
    async def work() -> None:
        scorers = Held(tiny)
        of = service(tiny, scorers=scorers, max_wait_ms=0)
        body = {**bodies()[0], "request_id": "r1"}
        first = asyncio.create_task(of.credit(body))
        while not scorers.batches:
            await asyncio.sleep(0.001)
        again = asyncio.create_task(of.credit(body))
        await asyncio.sleep(0)
        # The client of the first one leaves; the work goes on.
        first.cancel()
        scorers.go_on.set()
        answer = await again
        assert await of.credit(body) == answer
        assert scorers.batches == [1]
        with pytest.raises(
            ServiceError, match=r"request_id: must name one request, got 'r1' with other content; give"
        ) as t:
            await of.credit({**bodies()[1], "request_id": "r1"})
        assert t.value.status == 409
        await of.drain()

    run(work)


def test_answers_are_kept_up_to_a_number_of_tokens(tiny: Scorer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_KEPT_TOKENS", 40)

    async def work() -> None:
        of = service(tiny)
        for number in range(4):
            await of.credit({**bodies()[0], "request_id": str(number)})
        assert list(of._answered) == ["2", "3"]
        assert of._num_kept_tokens == 36
        await of.credit({**bodies()[0], "request_id": "0"})
        await of.drain()

    run(work)


def test_a_scorer_that_dies_loses_nothing(tiny: Scorer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.002)

    async def work() -> None:
        scorers = Held(tiny)
        scorers.go_on.set()
        scorers.lose = 3
        of = service(tiny, scorers=scorers)
        assert weights(await of.credit(bodies()[0])) == await alone(tiny, bodies()[0])
        assert "lost_scorers_total 3" in of.counters.text()
        scorers.lose = 10**6
        with pytest.raises(
            ServiceError, match=r"service: must have a scorer, got none that answered in 8 attempts;"
        ) as t:
            await of.credit({**bodies()[0], "request_id": "a"})
        assert (t.value.status, t.value.retry_after) == (503, 0.002)
        # The same request is accepted again, because it was not answered.
        scorers.lose = 0
        assert weights(await of.credit({**bodies()[0], "request_id": "a"})) == await alone(tiny, bodies()[0])
        await of.drain()

    run(work)


def test_an_unforeseen_error_is_answered_and_the_service_goes_on(tiny: Scorer, capsys: pytest.CaptureFixture[str]):
    async def work() -> None:
        scorers = Held(tiny)
        scorers.go_on.set()
        scorers.fail = RuntimeError("out of memory")
        of = service(tiny, scorers=scorers)
        with pytest.raises(
            ServiceError, match=r"service: must answer every request, got RuntimeError: out of mem.*; see"
        ) as t:
            await of.credit(bodies()[0])
        assert t.value.status == 500
        scorers.fail = None
        await of.credit(bodies()[0])
        await of.drain()

    run(work)
    assert "RuntimeError: out of memory" in capsys.readouterr().err


def test_a_stop_finishes_what_was_accepted(tiny: Scorer):
    async def work() -> None:
        scorers = Held(tiny)
        # Without the stop, these requests would wait for a minute.
        of = service(tiny, scorers=scorers, max_wait_ms=60_000)
        tasks = [
            asyncio.create_task(of.credit({**body, "request_id": str(number)})) for number, body in enumerate(bodies())
        ]
        await asyncio.sleep(0.01)
        stop = asyncio.create_task(of.drain())
        await asyncio.sleep(0.01)
        for call in (of.credit(bodies()[0]), of.load_adapter("1", Path("a"))):
            with pytest.raises(
                ServiceError, match=r"service: must be running, got a service that finishes .*; send"
            ) as told:
                await call
            assert (told.value.status, told.value.retry_after) == (503, 5.0)
        # A retry of an accepted request is still answered.
        retry = asyncio.create_task(of.credit({**bodies()[0], "request_id": "0"}))
        assert of.health()["status"] == "stopping"
        assert not stop.done()
        scorers.go_on.set()
        answers = await asyncio.gather(*tasks)
        await stop
        assert await retry == answers[0]
        assert of.num_open == 0

    run(work)


def test_credit_follows_the_policy_and_a_version_names_one_adapter(tiny: Scorer, tmp_path: Path):
    folders = [write_adapter(tmp_path / str(step), seed=step) for step in (1, 2, 3)]
    body = {**bodies()[0], "rule": "flow", "options": {"shape": "soft"}}

    async def work() -> None:
        of = service(tiny)
        found = [weights(await of.credit(body))]
        for step, folder in enumerate(folders[:2], 1):
            assert (await of.load_adapter(step, folder))["adapter_version"] == str(step)
            answer = await of.credit(body)
            assert answer["adapter_version"] == str(step)
            found.append(weights(answer))
        assert found[0] != found[1] != found[2]
        for version, expected in zip(("base", 1, "2"), found, strict=True):
            assert weights(await of.credit({**body, "adapter_version": version})) == expected
        # The same adapter under its version is no error, another one is, and the policy stays.
        assert (await of.load_adapter("2", folders[1]))["loaded"] == ["base", "1", "2"]
        with pytest.raises(
            ServiceError, match=r"version: must name one adapter, got '2' for .*; give every adapter its"
        ):
            await of.load_adapter("2", folders[2])
        assert of.current_version == "2"
        await of.load_adapter("3", folders[2])
        with pytest.raises(
            ServiceError, match=r"adapter_version: must be a version that is loaded, got '1'; loaded are"
        ):
            await of.credit({**body, "adapter_version": "1"})
        foreign = write_adapter(tmp_path / "foreign", seed=1, family="gpt2")
        with pytest.raises(FlowgraphError, match=r"adapter: must be a PEFT folder that fits the model, got .*; start"):
            await of.load_adapter("4", foreign)
        with pytest.raises(CheckpointError, match=r"adapter: must be a PEFT folder with .*; save"):
            await of.load_adapter("4", tmp_path / "none")
        assert of.health()["adapter_versions"] == ["base", "2", "3"]
        await of.drain()

    run(work)


def test_a_request_keeps_the_version_that_it_was_accepted_with(tiny: Scorer, tmp_path: Path):
    body = {**bodies()[0], "rule": "flow", "options": {"shape": "soft"}}

    async def work() -> None:
        expected = await alone(tiny, body)
        of = service(tiny, max_wait_ms=60_000)
        waiting = asyncio.create_task(of.credit(body))
        await asyncio.sleep(0.01)
        await of.load_adapter("1", write_adapter(tmp_path / "1", seed=1))
        await of.drain()
        answer = await waiting
        assert answer["adapter_version"] == "base"
        assert weights(answer) == expected

    run(work)


def test_an_invalid_request_is_not_accepted(tiny: Scorer):
    async def work() -> None:
        of = service(tiny)
        with pytest.raises(ConfigError, match=r"ids: must be integers in the vocabulary of 45 tokens, got 99"):
            await of.credit({"ids": [3, 99], "prompt_length": 1})
        assert of.num_open == 0
        await of.drain()

    run(work)

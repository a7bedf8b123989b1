"""The service without transport: a queue in front of one or several scorers.

A request is accepted, waits for others of similar length, is scored, and is answered. A request that is accepted is
answered, also when a scorer dies or the service is stopped.
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flowgraph import FlowgraphError
from rl.config import CreditConfig
from rl.credit.registry import applied, find_rule
from rl.errors import ServiceError, describe_cause
from rl.serving.adapters import BASE, AdapterRegistry, AdapterVersion, read_adapter
from rl.serving.counters import Counters
from rl.serving.credit_request import CreditRequest, read_request
from rl.serving.length_batches import LengthBatches
from rl.serving.limits import ServiceLimits
from rl.serving.scorer import ModelFacts, Scorer, ScoringJob, ScoringOutcome

_ATTEMPTS = 8
"""Times that a batch is sent to a scorer before its requests are given up."""
_FIRST_PAUSE = 0.25
"""Seconds before the second attempt; the pause doubles each time."""
_LONGEST_PAUSE = 8.0
_KEPT_TOKENS = 1_000_000
"""Weights of finished requests that are kept for retries."""
_LONGEST_RETRY_AFTER = 60.0


class ScorerLostError(Exception):
    """A scorer died before it answered; another one may do the same work."""


@runtime_checkable
class ScorerPool(Protocol):
    """Scorers that the service sends batches to, in this process or in others."""

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoringOutcome]:
        """Score a batch by any of the scorers; ``ScorerLostError`` where it died."""
        ...

    async def load(self, adapter: AdapterVersion) -> ScoringOutcome:
        """Load an adapter into one of the scorers; the others load it when they need it."""
        ...


class LocalScorers:
    """One scorer in this process, which runs in a thread.

    Args:
        scorer: it.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoringOutcome]:
        """Score a batch."""
        return await asyncio.to_thread(self._scorer.score, jobs)

    async def load(self, adapter: AdapterVersion) -> ScoringOutcome:
        """Load an adapter."""
        return await asyncio.to_thread(load_outcome, self._scorer, adapter)


def load_outcome(scorer: Scorer, adapter: AdapterVersion) -> ScoringOutcome:
    """Load an adapter; its error becomes part of the outcome, which may have to leave the process."""
    try:
        scorer.load(adapter)
    except FlowgraphError as error:
        return ScoringOutcome.of_error(error)
    return ScoringOutcome()


class RemoteError(FlowgraphError):
    """An error of a scorer, with the class that it had there.

    Attributes:
        kind: name of that class.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(eq=False)
class _Accepted:
    """A request that will be answered.

    Attributes:
        request: it.
        job: its work, under the adapter that it was accepted with.
        future: its answer.
    """

    request: CreditRequest
    job: ScoringJob
    future: asyncio.Future[dict[str, Any]]


class CreditService:
    """Accept requests, form batches, and answer every accepted request once.

    Requests with one ``request_id`` and the same content are the same request: a retry waits for the first one, or gets
    its answer again.

    Args:
        facts: of the model.
        rules: settings by the name of each rule that is offered; the first is the default.
        limits: of requests, batches and the queue.
        scorers: do the work.
        num_scorers: batches that are scored at the same time.

    Raises:
        CreditError: no rule.
    """

    def __init__(
        self,
        facts: ModelFacts,
        rules: Mapping[str, CreditConfig],
        limits: ServiceLimits,
        scorers: ScorerPool,
        *,
        num_scorers: int = 1,
    ) -> None:
        self.facts = facts
        self.rules = dict(rules)
        self.limits = limits
        self.counters = _counters(self)
        self._scorers = scorers
        self._adapters = AdapterRegistry(limits.kept_adapters)
        self._num_scorers = num_scorers
        self._batches: LengthBatches[_Accepted] = LengthBatches(limits.max_batch_tokens, limits.max_wait_ms / 1000)
        # Requests that are not answered yet, and answers that are kept, by their names.
        self._open: dict[str, _Accepted] = {}
        self._answered: OrderedDict[str, tuple[str, dict[str, Any], int]] = OrderedDict()
        self._num_kept_tokens = 0
        self._seconds_per_request = 0.0
        self._is_draining = False
        self._arrived = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._load_lock = asyncio.Lock()

    # What clients call ------------------------------------------------------------------------------

    async def credit(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a request for credit.

        Args:
            body: see :func:`rl.serving.credit_request.read_request`.

        Returns:
            ``request_id``, ``rule``, ``sign``, ``model``, ``adapter_version`` and ``sequences``, each with ``weights``,
            ``answer`` and, where the rule measures a tie, ``unanchored``.

        Raises:
            ServiceError: the service is stopping, the queue is full, the version is not loaded, or the name belongs to
                another request.
            FlowgraphError: an invalid request, or an error of the rule.
        """
        request = read_request(body, self.rules, self.facts, self.limits)
        # A retry of an accepted request is answered also while the service stops.
        known = self._known(request)
        if known is not None:
            self.counters.add("repeated_requests_total")
            return await asyncio.shield(known)
        self._check_admission()
        accepted = self._accept(request)
        # The work goes on when its client leaves, and the answer is kept for the retry.
        return await asyncio.shield(accepted.future)

    async def load_adapter(self, version: Any, folder: Path) -> dict[str, Any]:
        """Load an adapter and make it the current policy; the same adapter under its own version changes nothing else.

        Args:
            version: names it.
            folder: PEFT folder.

        Returns:
            ``adapter_version``, and ``loaded``: all versions that requests may name.

        Raises:
            ServiceError: another adapter has this version, or the service is stopping.
            CheckpointError: it cannot be loaded, or does not fit.
        """
        if self._is_draining:
            raise _stopping()
        # One load at a time: two requests must not give one version to two adapters.
        async with self._load_lock:
            adapter = await asyncio.to_thread(read_adapter, version, folder)
            self._adapters.check(adapter)
            outcome = await self._until_done(lambda: self._scorers.load(adapter))
            if outcome.error:
                raise RemoteError(outcome.error, outcome.message)
            self._adapters.add(adapter)
        self.counters.add("adapter_loads_total")
        return {"adapter_version": adapter.version, "loaded": self._adapters.versions()}

    def health(self) -> dict[str, Any]:
        """Describe the service."""
        return {
            "status": "stopping" if self._is_draining else "ok",
            "model": self.facts.name,
            "dtype": self.facts.dtype,
            "rules": list(self.rules),
            "adapter_version": self.current_version,
            "adapter_versions": self._adapters.versions(),
            "waiting": self.num_waiting,
            "in_progress": self.num_open - self.num_waiting,
        }

    async def drain(self) -> None:
        """Refuse new requests, and return when every accepted one is answered."""
        # The dispatcher no longer waits for requests of similar length.
        self._is_draining = True
        self._arrived.set()
        while self._open:
            await asyncio.wait([accepted.future for accepted in self._open.values()])
        if self._dispatcher is not None:
            self._dispatcher.cancel()
            self._dispatcher = None

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the service stops."""
        return self._is_draining

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a batch."""
        return len(self._batches)

    @property
    def num_open(self) -> int:
        """Requests that are not answered yet."""
        return len(self._open)

    @property
    def current_version(self) -> str:
        """Version of the policy that scores requests which name none."""
        current = self._adapters.current
        return BASE if current is None else current.version

    # Admission --------------------------------------------------------------------------------------

    def _known(self, request: CreditRequest) -> asyncio.Future[dict[str, Any]] | None:
        """Return the answer of an equal request, or its future; None for a new one."""
        name = request.request_id
        digest = None
        future = None
        if name in self._open:
            digest = self._open[name].request.digest
            future = self._open[name].future
        elif name in self._answered:
            digest, answer, _ = self._answered[name]
            future = asyncio.get_running_loop().create_future()
            future.set_result(answer)
        if digest is not None and digest != request.digest:
            raise ServiceError(
                f"request_id: must name one request, got {name!r} with other content; give every request its own name",
                status=409,
            )
        return future

    def _check_admission(self) -> None:
        """Refuse a request where the service stops or the queue is full."""
        if self._is_draining:
            raise _stopping()
        if self.num_waiting >= self.limits.max_queue:
            seconds = max(1.0, min(self.num_waiting * self._seconds_per_request, _LONGEST_RETRY_AFTER))
            raise ServiceError(
                f"queue: must hold fewer than {self.limits.max_queue} requests, got {self.num_waiting} waiting; try "
                f"again in {seconds:.0f} s, or start the service with more --replicas",
                status=429,
                retry_after=seconds,
            )

    def _accept(self, request: CreditRequest) -> _Accepted:
        """Put a request into the queue."""
        # The version is fixed now: a policy that is loaded later does not score this request.
        job = request.job(self._adapters.resolve(request.adapter_version))
        loop = asyncio.get_running_loop()
        accepted = _Accepted(request, job, loop.create_future())
        # A client that has left does not read the error of its request.
        accepted.future.add_done_callback(_read_error)
        self._open[request.request_id] = accepted
        self._batches.add(
            accepted, key=job.pass_key, longest=max(job.lengths), num_sequences=len(job.sequences), now=loop.time()
        )
        self.counters.add("sequences_total", len(job.sequences))
        self.counters.add("tokens_total", job.num_tokens)
        self._arrived.set()
        if self._dispatcher is None:
            self._dispatcher = loop.create_task(self._dispatch())
        return accepted

    # Batches ----------------------------------------------------------------------------------------

    async def _dispatch(self) -> None:
        """Send batches to the scorers, as many at a time as there are scorers."""
        loop = asyncio.get_running_loop()
        while True:
            # Waiting for a scorer before the batch is formed lets the batch grow meanwhile.
            while len(self._running) >= self._num_scorers:
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            self._arrived.clear()
            batch = self._batches.take(loop.time(), at_once=self._is_draining)
            if batch:
                task = loop.create_task(self._score(batch))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
                continue
            try:
                await asyncio.wait_for(self._arrived.wait(), self._batches.due_in(loop.time()))
            except TimeoutError:
                # The oldest request has waited long enough.
                continue

    async def _score(self, batch: Sequence[_Accepted]) -> None:
        """Score a batch and answer its requests."""
        begun = time.perf_counter()
        try:
            outcomes = await self._until_done(lambda: self._scorers.score([accepted.job for accepted in batch]))
        except ServiceError as error:
            for accepted in batch:
                self._close(accepted, error)
            return
        except Exception as error:  # noqa: BLE001  (no accepted request may stay without an answer)
            traceback.print_exc(file=sys.stderr)
            failure = ServiceError(
                f"service: must answer every request, got {describe_cause(error)}; see the log of the service",
                status=500,
            )
            for accepted in batch:
                self._close(accepted, failure)
            return

        seconds = time.perf_counter() - begun
        self.counters.add("batches_total")
        self.counters.add("batch_requests_total", len(batch))
        self.counters.add("scoring_seconds_total", seconds)
        # A moving average; the queue is answered by all scorers together.
        per_request = seconds / len(batch) / self._num_scorers
        self._seconds_per_request += 0.2 * (per_request - self._seconds_per_request)
        for accepted, outcome in zip(batch, outcomes, strict=True):
            self.counters.add("alone_sequences_total", outcome.alone)
            if outcome.error:
                self._close(accepted, RemoteError(outcome.error, outcome.message))
            else:
                self._answer(accepted, outcome)

    async def _until_done(self, attempt: Any) -> Any:
        """Call a scorer until it answers: the work has no effects, so that it may be repeated.

        Raises:
            ServiceError: no scorer has answered.
        """
        pause = _FIRST_PAUSE
        for number in range(_ATTEMPTS):
            try:
                return await attempt()
            except ScorerLostError:
                self.counters.add("lost_scorers_total")
            if number < _ATTEMPTS - 1:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise ServiceError(
            f"service: must have a scorer, got none that answered in {_ATTEMPTS} attempts; try again, and see the log "
            "of the service",
            retry_after=_LONGEST_PAUSE,
        )

    def _answer(self, accepted: _Accepted, outcome: ScoringOutcome) -> None:
        """Answer a request, and keep the answer for a retry."""
        request = accepted.request
        answer = _answer_of(accepted, outcome, self.facts.name)
        # The oldest answers make room.
        size = accepted.job.num_tokens
        self._answered[request.request_id] = (request.digest, answer, size)
        self._num_kept_tokens += size
        while self._num_kept_tokens > _KEPT_TOKENS:
            _, (_, _, dropped) = self._answered.popitem(last=False)
            self._num_kept_tokens -= dropped
        del self._open[request.request_id]
        accepted.future.set_result(answer)

    def _close(self, accepted: _Accepted, error: FlowgraphError) -> None:
        """Answer a request with an error; the same request may be sent again."""
        del self._open[accepted.request.request_id]
        accepted.future.set_exception(error)


def _answer_of(accepted: _Accepted, outcome: ScoringOutcome, model: str) -> dict[str, Any]:
    """Write the answer of a request as JSON values."""
    request = accepted.request
    sequences = []
    for row, found in enumerate(outcome.sequences):
        entry: dict[str, Any] = {
            "weights": found.weights,
            "answer": {"found": found.found, "characters": None if found.answer is None else list(found.answer)},
        }
        if found.unanchored is not None:
            entry["unanchored"] = found.unanchored
        if request.is_text[row]:
            entry["response_ids"] = list(request.sequences[row].response_ids)
        sequences.append(entry)
    # The trainer applies the sign, because the service has no advantages.
    adapter = accepted.job.adapter
    sign = request.credit.sign
    if sign == "rule":
        sign = find_rule(applied(request.credit).rule).sign
    return {
        "request_id": request.request_id,
        "rule": request.credit.rule,
        "sign": sign,
        "model": model,
        "adapter_version": BASE if adapter is None else adapter.version,
        "sequences": sequences,
    }


def _counters(service: CreditService) -> Counters:
    """Declare the figures of a service."""
    counters = Counters()
    counters.declare("requests_total", "Answered HTTP requests by path and status.")
    counters.declare("request_seconds_total", "Seconds from request to answer, of requests for credit.")
    counters.declare("sequences_total", "Accepted sequences.")
    counters.declare("tokens_total", "Tokens of accepted sequences, without padding.")
    counters.declare("batches_total", "Batches that were scored.")
    counters.declare("batch_requests_total", "Requests in these batches.")
    counters.declare("scoring_seconds_total", "Seconds that batches took in scorers.")
    counters.declare("alone_sequences_total", "Sequences that were scored without a batch.")
    counters.declare("repeated_requests_total", "Retries that got the answer of an equal request.")
    counters.declare("lost_scorers_total", "Attempts that ended because a scorer died.")
    counters.declare("adapter_loads_total", "Adapters that were loaded by clients.")
    counters.declare_gauge("waiting_requests", "Requests that wait for a batch.", lambda: service.num_waiting)
    counters.declare_gauge("open_requests", "Requests that are not answered yet.", lambda: service.num_open)
    return counters


def _stopping() -> ServiceError:
    """Return the error of a request to a service that stops."""
    return ServiceError(
        "service: must be running, got a service that finishes its accepted requests and stops; send the request to "
        "its successor",
        status=503,
        retry_after=5.0,
    )


def _read_error(future: asyncio.Future[dict[str, Any]]) -> None:
    """Read the error of a future, so that asyncio does not report it as forgotten."""
    if not future.cancelled():
        future.exception()

"""The service on Ray Serve: one replica that accepts requests, and N replicas that score batches.

Ray is imported inside the functions, because it is an optional package.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgraph import FlowgraphError, MissingExtraError
from rl.config import CreditConfig
from rl.errors import ServiceError, describe_cause, named_error
from rl.serving.access import Access
from rl.serving.adapters import AdapterVersion
from rl.serving.credit_service import CreditService, RemoteError, ScorerLostError, load_outcome
from rl.serving.endpoints import Endpoints
from rl.serving.limits import ServiceLimits
from rl.serving.scorer import ModelFacts, Scorer, ScoringJob, ScoringOutcome

APPLICATION = "flowgraph-credit"
"""Name of the application in Ray Serve."""

_HEALTH_PERIOD = 2.0
"""Seconds between two checks whether a replica lives."""
_START_ATTEMPTS = 3
"""Times that Ray is started before it is given up."""
_START_SECONDS = 600.0
"""Longest time for a scorer to load its model."""
_STOP_SECONDS = 600.0
"""Longest time for accepted requests to be answered when the service stops."""
_MORE_CONNECTIONS = 1_000
"""Requests that reach the service beyond its queue, to be refused by it with a message of its own."""


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What the replicas are started with.

    Attributes:
        model: name or folder, or a shipped model.
        dtype: of the model.
        device: of the scorers; None: the CPU.
        task: finds the answers; None: stated answers.
        rules: settings by the name of each rule.
        adapter: PEFT folder of the first policy; None: the model itself.
        adapter_version: its version.
        adapter_root: folder below which clients may name adapters.
        limits: of requests and batches.
        token_digest: SHA-256 of the token, so that Ray never holds the token; None: no token.
        replicas: scorers.
        host: address to listen on.
        port: to listen on.
    """

    model: str
    dtype: str
    device: str | None
    task: str | None
    rules: dict[str, CreditConfig]
    adapter: Path | None
    adapter_version: str | None
    adapter_root: Path | None
    limits: ServiceLimits
    token_digest: bytes | None
    replicas: int
    host: str
    port: int


def require_ray() -> None:
    """Check that Ray Serve is installed.

    Raises:
        MissingExtraError: it is not.
    """
    is_installed = importlib.util.find_spec("ray") is not None and importlib.util.find_spec("starlette") is not None
    if not is_installed:
        raise MissingExtraError(
            "serve: must have the package ray with Serve, got an environment without it; pip install "
            "'flowgraph-llm[ray]', or pip install 'ray[serve]'"
        )


class ScorerReplica:
    """A scorer in a process of its own; a failure of its start is kept, and told to the replica that accepts requests.

    Args:
        settings: of the service.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self._failure = ScoringOutcome()
        try:
            self._scorer = Scorer(
                settings.model,
                dtype=settings.dtype,
                device=settings.device,
                limits=settings.limits,
                task=settings.task,
            )
            self._scorer.check_rules(list(settings.rules.values()))
        except FlowgraphError as error:
            self._failure = ScoringOutcome.of_error(error)

    def facts(self) -> ModelFacts | ScoringOutcome:
        """Return what the service needs to know of the model, or why it cannot be used."""
        return self._failure if self._failure.error else self._scorer.facts

    def score(self, jobs: Sequence[ScoringJob]) -> list[ScoringOutcome]:
        """Score a batch."""
        return self._scorer.score(jobs)

    def load(self, adapter: AdapterVersion) -> ScoringOutcome:
        """Load an adapter."""
        return load_outcome(self._scorer, adapter)


class RayScorers:
    """The scorers behind a handle of Ray Serve.

    Args:
        handle: of the deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def facts(self) -> ModelFacts | ScoringOutcome:
        """Ask a scorer for the facts of its model."""
        return await self._ask(self._handle.facts.remote)

    async def score(self, jobs: Sequence[ScoringJob]) -> list[ScoringOutcome]:
        """Score a batch by any scorer that is free."""
        return await self._ask(self._handle.score.remote, list(jobs))

    async def load(self, adapter: AdapterVersion) -> ScoringOutcome:
        """Load an adapter into one scorer."""
        return await self._ask(self._handle.load.remote, adapter)

    async def _ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a scorer; its death is an error of its own kind."""
        from ray.exceptions import RayActorError  # pyright: ignore[reportMissingImports]
        from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError  # pyright: ignore[reportMissingImports]

        try:
            return await method(*arguments)
        except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
            raise ScorerLostError(type(error).__name__) from error


class FrontReplica:
    """The replica that accepts requests.

    Args:
        settings: of the service.
        scorers: handle of the scorers.
    """

    def __init__(self, settings: ServiceSettings, scorers: Any) -> None:
        self._settings = settings
        self._scorers = RayScorers(scorers)
        self._service: CreditService | None = None
        self._endpoints: Endpoints | None = None
        self._start_lock = asyncio.Lock()

    async def start(self) -> ScoringOutcome:
        """Wait for the scorers and load the first adapter; return the error of the start, if there is one."""
        settings = self._settings
        facts = await self._scorers.facts()
        if isinstance(facts, ScoringOutcome):
            return facts
        # Batches in progress at the same time: one for each scorer.
        service = CreditService(facts, settings.rules, settings.limits, self._scorers, num_scorers=settings.replicas)
        if settings.adapter is not None:
            try:
                await service.load_adapter(settings.adapter_version, settings.adapter)
            except RemoteError as error:
                return ScoringOutcome(error=error.kind, message=str(error))
            except FlowgraphError as error:
                return ScoringOutcome.of_error(error)
        self._endpoints = Endpoints(service, Access(settings.token_digest), settings.adapter_root)
        self._service = service
        return ScoringOutcome()

    async def __call__(self, request: Any) -> Any:
        """Answer a request of HTTP."""
        from starlette.responses import Response  # pyright: ignore[reportMissingImports]

        async with self._start_lock:
            if self._endpoints is None:
                # This replica was started anew after it died: clients send their requests again.
                await self.start()
        if self._endpoints is None:
            return Response(status_code=503, headers={"retry-after": "5"})
        headers = {name.lower(): value for name, value in request.headers.items()}
        reply = await self._endpoints.respond(request.method, request.url.path, headers, request.stream())
        return Response(content=reply.body, status_code=reply.status, headers=dict(reply.headers))

    async def drain(self) -> None:
        """Answer every accepted request, and refuse new ones."""
        if self._service is not None:
            await self._service.drain()


def run_service(settings: ServiceSettings, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; then finish the accepted requests.

    Args:
        settings: of the service; the address was checked.
        announce: prints one line.

    Raises:
        FlowgraphError: the model, a rule or the adapter cannot be used.
    """
    # Ray reads these when it is imported; nothing is sent to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]

    # Ray counts processors: the scorers share those of the machine.
    threads = max(1, (os.cpu_count() or 1) // settings.replicas)
    is_on_gpu = settings.device is not None and settings.device.startswith("cuda")
    _start_ray(ray, threads * settings.replicas)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.host, "port": settings.port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        scorer = serve.deployment(
            ScorerReplica,
            name="scorer",
            num_replicas=settings.replicas,
            # A batch at a time: another one would wait in the replica for the model.
            max_ongoing_requests=1,
            ray_actor_options={"num_cpus": threads, "num_gpus": 1 if is_on_gpu else 0},
            health_check_period_s=_HEALTH_PERIOD,
        )
        front = serve.deployment(
            FrontReplica,
            name="front",
            num_replicas=1,
            max_ongoing_requests=settings.limits.max_queue + _MORE_CONNECTIONS,
            ray_actor_options={"num_cpus": 0},
            health_check_period_s=_HEALTH_PERIOD,
            graceful_shutdown_timeout_s=_STOP_SECONDS,
        )
        # The scorers are started with the application; the first call waits until their model is loaded.
        application = front.bind(settings, scorer.bind(settings))
        handle = serve.run(application, name=APPLICATION, route_prefix="/")
        outcome = handle.start.remote().result(timeout_s=_START_SECONDS)
        if outcome.error:
            raise _typed_error(outcome)
        announce(
            f"listening on http://{settings.host}:{settings.port}; Ctrl-C finishes the accepted requests and stops"
        )
        _wait_for_stop()
        announce("stopping: new requests are refused, accepted ones are finished")
        handle.drain.remote().result(timeout_s=_STOP_SECONDS)
    finally:
        serve.shutdown()
        ray.shutdown()


def _start_ray(ray: Any, num_cpus: int) -> None:
    """Start Ray on this machine alone.

    Raises:
        ServiceError: it does not start.
    """
    for attempt in range(_START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address="127.0.0.1",
            )
            return
        except Exception as error:  # Ray raises plain exceptions where its own processes do not start.
            # Ray waits 15 s for its own helper, which takes longer on a busy machine while it is read from disk.
            ray.shutdown()
            if attempt + 1 == _START_ATTEMPTS:
                raise ServiceError(
                    f"serve: Ray must start on this machine, got {describe_cause(error)} in {_START_ATTEMPTS} "
                    "attempts; free processors and memory, and start the service again"
                ) from error


def _wait_for_stop() -> None:
    """Wait for SIGINT or SIGTERM."""
    stop = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        stop.set()

    # After ray.init, which sets handlers of its own.
    earlier = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # A wait without end is not interrupted by signals on every system.
        while not stop.wait(0.5):
            pass
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _typed_error(outcome: ScoringOutcome) -> FlowgraphError:
    """Return the error of a replica in its own class."""
    # The replica runs the same package, so that the name is known.
    return named_error(outcome.error, outcome.message) or ServiceError(outcome.message)

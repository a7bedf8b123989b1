"""Workers on Ray: connect to a cluster, run the tasks of a corpus through Ray Data, and translate what goes wrong.

The only module that imports Ray, inside functions.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from flowgraph.corpus.corpus_ray import LOCAL_STORE, CorpusRay
from flowgraph.corpus.ray_worker import RayJob, RayWorker, TaskOutcome
from flowgraph.errors import (
    ClusterError,
    FlowgraphError,
    InvalidInputError,
    MemoryLimitError,
    OutputError,
    first_line,
)

_MOST_BLOCKS = 4096
"""Blocks that the tasks of a run are divided into; a small run has one task a block."""
_TASKS_IN_FLIGHT = 2
"""Tasks that a worker has at once: one that it works on, and one that waits."""
_PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR'); ray.shutdown()"
"""Connects in a process of its own, because a failed connection can end the process that tries."""


@dataclass(frozen=True)
class Pool:
    """The workers of a run.

    Attributes:
        workers: their number.
        threads: torch threads of each.
        uses_gpu: whether each has a GPU.
        object_store_memory: most bytes of the store that the run uses; None: no limit of its own.
    """

    workers: int
    threads: int
    uses_gpu: bool
    object_store_memory: int | None


@contextmanager
def connected(choice: CorpusRay, threads: int, *, uses_gpu: bool) -> Iterator[Pool]:
    """Connect to the cluster, or start Ray on this machine; what is connected or started here ends with the block.

    Args:
        choice: the cluster and its workers.
        threads: torch threads of a worker.
        uses_gpu: whether each worker has a GPU.

    Raises:
        InvalidInputError: no cluster answers, or it has fewer processors than are asked for.
        ClusterError: Ray does not start on this machine.
    """
    # Ray reports what is used to its makers unless it is told not to, and its core prints into the terminal.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray  # pyright: ignore[reportMissingImports]

    if ray.is_initialized():
        if not choice.is_local:
            raise InvalidInputError(
                f"ray: address must be None in a process that is connected to Ray, got {choice.address!r}; leave it "
                "out, or call ray.shutdown() first"
            )
        yield _pool(choice, threads, choice.object_store_memory, uses_gpu=uses_gpu)
        return

    with _quiet():
        try:
            if choice.is_local:
                _start(choice, threads)
            else:
                _check_answer(choice)
                ray.init(address=choice.address, log_to_driver=False, logging_level="ERROR")
            # The store of a Ray that was started for the run is as large as was asked for.
            limit = None if choice.is_local else choice.object_store_memory
            yield _pool(choice, threads, limit, uses_gpu=uses_gpu)
        finally:
            ray.shutdown()


def _start(choice: CorpusRay, threads: int) -> None:
    """Start Ray on this machine."""
    import ray  # pyright: ignore[reportMissingImports]

    processors = os.cpu_count() or 1
    num_cpus = max(processors, (choice.workers or 1) * threads)
    store = choice.object_store_memory or LOCAL_STORE
    try:
        # By name, so that RAY_ADDRESS of the environment does not lead to another cluster.
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=store,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except Exception as error:
        # Ray raises a bare Exception where a process of its own does not start in time.
        raise ClusterError(
            f"ray: must start on this machine, got {first_line(error)}; free some processors or memory and run the "
            "same command again, or leave ray out to run in one process"
        ) from error


def _check_answer(choice: CorpusRay) -> None:
    """Refuse a cluster that does not answer in time, or that runs another version."""
    address = str(choice.address)
    if choice.endpoint is not None:
        # Most wrong addresses fail here, in milliseconds.
        try:
            socket.create_connection(choice.endpoint, timeout=choice.wait).close()
        except OSError as error:
            raise _no_answer(address, error.strerror or str(error)) from error
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE, address], capture_output=True, text=True, timeout=choice.wait, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _no_answer(address, f"nothing of Ray in {choice.wait:g} s") from error
    if probe.returncode:
        raise _no_answer(address, _reason(probe.stderr))


def _reason(log: str) -> str:
    """Return the line of a log that names an error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line]
    for line in named or lines[-1:]:
        return f"{line:.200}"
    return "nothing of Ray"


def _no_answer(address: str, reason: str) -> InvalidInputError:
    """Build the error for a cluster that does not answer."""
    return InvalidInputError(
        f"ray: address must be that of a cluster that answers, with the same Ray and Python, got {address!r} "
        f"({reason}); start one with ray start --head, or leave the address out"
    )


def _pool(choice: CorpusRay, threads: int, object_store_memory: int | None, *, uses_gpu: bool) -> Pool:
    """Choose the number of workers, and refuse more than the cluster has processors for."""
    import ray  # pyright: ignore[reportMissingImports]

    resources = ray.cluster_resources()
    num_cpus = int(resources.get("CPU", 0))
    num_gpus = int(resources.get("GPU", 0))
    most = num_gpus if uses_gpu else num_cpus // threads
    workers = choice.workers or max(most, 1)
    if workers > most:
        each = "one GPU each" if uses_gpu else f"{threads} threads each"
        raise InvalidInputError(
            f"workers: must fit the cluster, got {workers} with {each} for {num_cpus} CPUs and {num_gpus} GPUs; "
            "use fewer workers or threads (threads=1 rounds like a run with OMP_NUM_THREADS=1)"
        )
    return Pool(workers, threads, uses_gpu, object_store_memory)


def check_sendable(job: RayJob) -> None:
    """Refuse choices that cannot be sent to a worker.

    Raises:
        InvalidInputError: pickle cannot write one of them.
    """
    from pickle import PicklingError

    from ray import cloudpickle  # pyright: ignore[reportMissingImports]

    try:
        cloudpickle.dumps(job)
    except (TypeError, AttributeError, PicklingError) as error:
        raise InvalidInputError(
            f"ray: every option must be one that pickle can send to a worker, got {first_line(error)}; "
            "use texts and functions of a module instead of objects that are open"
        ) from error


def run_tasks(job: RayJob, places: Sequence[tuple[int, int]], pool: Pool) -> Generator[TaskOutcome, None, None]:
    """Run tasks on the workers through Ray Data; yields each outcome as it comes, in any order.

    Ray starts a dead worker anew and gives its task to another, without end. :class:`WorkNotes` ends it for a line
    that kills its workers.

    Args:
        job: what every worker needs to know.
        places: offset and size of every task in the file of tasks.
        pool: the workers.

    Raises:
        FlowgraphError: an error of a worker that concerns every line, as the class that it was there.
        ClusterError: the cluster broke off.
        MemoryLimitError: its object store is full.
        OutputError: its disk is full.
    """
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]

    check_sendable(job)
    workers = min(pool.workers, len(places))
    rows = [{"start": start, "size": size} for start, size in places]
    # A worker of a GPU reserves it; the others reserve their threads.
    reserved = {"num_gpus": 1} if pool.uses_gpu else {"num_cpus": pool.threads}
    with _quiet(), _limited(pool.object_store_memory):
        try:
            # Small blocks: a lost worker repeats little, and every finished batch is reported at once.
            tasks = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS))
            results = tasks.map_batches(
                RayWorker,
                fn_constructor_args=(job,),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT),
                **reserved,
            )
            for block in results.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
                for text in block["outcome"]:
                    outcome = TaskOutcome.from_text(str(text))
                    outcome.raise_fatal()
                    yield outcome
        except ray.exceptions.RayError as error:
            raise translated(error) from error


def translated(error: Exception) -> FlowgraphError:
    """Translate an error of Ray."""
    from ray import exceptions  # pyright: ignore[reportMissingImports]

    # The error of a task holds that of its worker, behind a traceback.
    cause = getattr(error, "cause", None)
    reason = first_line(error)
    if isinstance(cause, Exception):
        reason = f"{type(cause).__name__}: {first_line(cause)}"
    if isinstance(error, exceptions.OutOfDiskError):
        return OutputError(
            f"ray: the disk of every machine must have space, got a full one ({reason}); free some, and run the same "
            "command again: it continues from here"
        )
    if isinstance(error, exceptions.ObjectStoreFullError | exceptions.OutOfMemoryError):
        return MemoryLimitError(
            f"object_store_memory: the store and memory of the cluster must have space, got a full one ({reason}); "
            "raise object_store_memory or use fewer workers, and run the same command again: it continues from here"
        )
    return ClusterError(
        f"ray: the workers must finish their work, got {type(error).__name__} ({reason}); see the logs of Ray "
        "(/tmp/ray/session_latest/logs), and run the same command again: it continues from here"
    )


@contextmanager
def _limited(object_store_memory: int | None) -> Iterator[None]:
    """Limit what Ray Data holds in the object store, and show no progress of its own."""
    from ray.data import DataContext  # pyright: ignore[reportMissingImports]

    context = DataContext.get_current()
    had_bars = context.enable_progress_bars
    had_limits = context.execution_options.resource_limits
    context.enable_progress_bars = False
    if object_store_memory is not None:
        limits = type(had_limits).for_limits(had_limits.cpu, had_limits.gpu, object_store_memory=object_store_memory)
        context.execution_options.resource_limits = limits
    try:
        yield
    finally:
        context.enable_progress_bars = had_bars
        context.execution_options.resource_limits = had_limits


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the deprecations and the log lines of Ray itself; its errors are translated."""
    logger = logging.getLogger("ray")
    data_logger = logging.getLogger("ray.data")
    level = logger.level
    data_level = data_logger.level
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, ResourceWarning):
            warnings.filterwarnings("ignore", category=category, module=r"ray(\.|$)")
        logger.setLevel(logging.CRITICAL)
        data_logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
            data_logger.setLevel(data_level)

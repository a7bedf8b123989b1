"""A corpus on a real Ray of two workers; skipped where Ray Data is not installed."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from flowgraph import ClusterError, CorpusProgress, CorpusRay, InvalidInputError, MemoryLimitError, OutputError
from flowgraph.corpus import ray_pool
from flowgraph.corpus.corpus_ray import LEAST_STORE
from flowgraph.corpus.ray_pool import connected, translated
from flowgraph.corpus.ray_worker import WorkerRun
from tests.corpus.test_ray_run import equal
from tests.corpus.test_trace_corpus import LINES, run
from tests.fixtures.tiny import tiny

NEEDED = [name for name in ("ray", "pyarrow", "pandas") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(NEEDED), reason=f"needs Ray Data: pip install 'ray[data]' (missing: {', '.join(NEEDED)})"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]
OPTIONS = {"batch_tokens": 120}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all tests of this file; a run uses the Ray that its process is connected to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with connected(CorpusRay(workers=2, threads=1, object_store_memory=LEAST_STORE), 1, uses_gpu=False):
        yield
    torch.set_num_threads(threads)
    # Ray leaves the processes that it ended to the garbage collector, which warns.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def alone(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("alone"), LINES, **OPTIONS).out


def test_two_workers_one_of_which_kills_itself_write_the_same_files(cluster: None, alone: Path, tmp_path: Path):
    marker = tmp_path / "died"
    choice = CorpusRay(workers=2, load=partial(deadly_once, str(marker)))
    seen: list[CorpusProgress] = []
    summary = run(tmp_path, LINES, ray=choice, progress=seen.append, **OPTIONS)
    assert marker.exists()
    assert (summary.now, summary.errors) == (len(LINES), ())
    assert [at.now for at in seen if at.stage == "tracing"] == list(range(1, len(LINES) + 1))
    equal(summary.out, alone)


def deadly_once(marker: str) -> tuple:
    """Load the model in a worker that kills itself between a trace and its record, unless another one has."""
    real = WorkerRun._finish

    def finish(self: WorkerRun, *arguments: object) -> None:
        if self.now == 1 and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, *arguments)

    WorkerRun._finish = finish
    return tiny()


def test_a_stopped_run_keeps_what_is_done_and_its_workers_end(cluster: None, alone: Path, tmp_path: Path):
    def stop(at: CorpusProgress) -> None:
        if at.now >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, LINES, ray=CorpusRay(workers=1), progress=stop, **OPTIONS)
    # A worker that is still alive ends at its next piece of work, because its notes are gone.
    assert not (tmp_path / "out" / ".ray").exists()
    resumed = run(tmp_path, LINES, **OPTIONS)
    assert resumed.traced == len(LINES)
    assert resumed.now <= len(LINES) - 2
    equal(resumed.out, alone)


def test_what_a_worker_cannot_do_is_one_message(cluster: None, tmp_path: Path):
    with pytest.raises(InvalidInputError, match=r"load: must return model .*, got ValueError: no such weights; check"):
        run(tmp_path, LINES[:1], ray=CorpusRay(load=broken), **OPTIONS)
    with pytest.raises(InvalidInputError, match=r"workers: must fit the cluster, got 500 with 1 threads each for"):
        run(tmp_path, LINES[:1], ray=CorpusRay(workers=500), **OPTIONS)
    with pytest.raises(InvalidInputError, match=r"workers: must fit the cluster, got 1 with one GPU each for"):
        run(tmp_path, LINES[:1], ray=CorpusRay(device="cuda"), **OPTIONS)
    with pytest.raises(InvalidInputError, match="ray: address must be None in a process that is connected to Ray, got"):
        run(tmp_path, LINES[:1], ray="auto", **OPTIONS)
    locked = partial(broken, (tmp_path / "open").open("w"))
    with pytest.raises(InvalidInputError, match="ray: every option must be one that pickle can send to a worker, got"):
        run(tmp_path, LINES[:1], ray=CorpusRay(load=locked), **OPTIONS)


def broken(*_: object) -> tuple:
    raise ValueError("no such weights")


def test_errors_of_ray_are_translated(cluster: None):
    from ray import exceptions  # pyright: ignore[reportMissingImports]

    full = translated(exceptions.ObjectStoreFullError("store full"))
    assert isinstance(full, MemoryLimitError)
    assert "object_store_memory: the store and memory of the cluster must have space, got a full one (" in str(full)
    disk = translated(exceptions.OutOfDiskError("disk full"))
    assert isinstance(disk, OutputError)
    assert "ray: the disk of every machine must have space, got a full one (" in str(disk)
    other = translated(exceptions.RaySystemError("x"))
    assert isinstance(other, ClusterError)
    assert "run the same command again: it continues from here" in str(other)
    task = translated(exceptions.RayTaskError("work", "Traceback", ValueError("odd\nmore")))
    assert "got RayTaskError (ValueError: odd); see the logs" in str(task)


def test_a_port_that_is_not_of_ray_is_refused_in_time(cluster: None):
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(InvalidInputError, match=f"ray: address must be that of a cluster .* got '{address}'"):
            ray_pool._check_answer(CorpusRay(address=address, wait=5))
        assert time.monotonic() - began < 30

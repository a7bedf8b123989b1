"""A run whose batches are traced on Ray: plan here, trace on the workers, count here.

The batches are those of a run in one process, and depend on the input alone. What a worker finishes it writes to the
folder, so a run may begin with Ray and end without, and the other way round.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowgraph.attention.modules import base_model
from flowgraph.corpus.corpus_ray import CorpusRay, device_of
from flowgraph.corpus.ray_pool import Pool, connected, run_tasks
from flowgraph.corpus.ray_worker import CorpusTask, Load, RayJob, SavedModel, save_model
from flowgraph.corpus.requests import CorpusFields, Line, read_requests
from flowgraph.corpus.run import Requests, Run
from flowgraph.errors import ClusterError
from flowgraph.files import write_text

_SHOWN_LINES = 8


@dataclass(frozen=True)
class _Window:
    """The valid lines of a window with something to do, and the numbers of the unfinished ones."""

    lines: list[Line]
    unfinished: set[int]


def trace_on_ray(
    run: Run,
    windows: Sequence[Sequence[Line]],
    path: Path,
    names: CorpusFields,
    settings: dict[str, Any],
    choice: CorpusRay,
) -> None:
    """Trace the unfinished lines of a file on the workers of a cluster.

    Args:
        run: its counts, folder and choices; its model only encodes here.
        windows: all lines, in the groups that are batched together.
        path: the input file.
        names: the keys of a line.
        settings: everything that decides a result.
        choice: the cluster and its workers.

    Raises:
        InvalidInputError: no cluster answers, or its workers have another model or other packages.
        ClusterError: the cluster broke off, or did not return every line.
        MemoryLimitError: a batch does not fit a worker.
        OutputError: a result cannot be written.

    Cost: every line is encoded twice, here and on its worker.
    """
    work = _unfinished_windows(run, windows)
    if not work:
        return
    # Nothing is traced here, so the memory of this machine is no limit.
    run.checks_memory = False
    threads = choice.threads or torch.get_num_threads()
    device = device_of(choice, run.model)
    notes = run.folder.make_notes().absolute()
    implementation = base_model(run.model).config._attn_implementation
    load: Load = choice.load or SavedModel(str(notes / "model"), device, implementation)
    job = RayJob(
        path=str(path.absolute()),
        fields=names,
        out=str(run.folder.out.absolute()),
        notes=str(notes),
        options=run.options,
        settings=settings,
        threads=threads,
        retries=choice.retries,
        load=load,
    )
    try:
        run.progress("starting Ray")
        with connected(choice, threads, uses_gpu=device == "cuda") as pool:
            _trace_on(pool, run, work, job)
    finally:
        # A worker that is still alive, as on a cluster after Ctrl-C, ends here: it cannot note its next work.
        run.folder.remove_temporary_files()


def _trace_on(pool: Pool, run: Run, work: Sequence[_Window], job: RayJob) -> None:
    """Generate the responses that are missing, and trace the batches."""
    if isinstance(job.load, SavedModel):
        run.progress("writing the model for the workers")
        save_model(Path(job.load.path), run.model, run.tokenizer)

    # Batches depend on the lengths of all responses, so those that are missing come first.
    missing = _lines_without_response(run, work, job)
    failed: set[int] = set()
    if missing:
        run.progress("generating responses")
        tasks = [CorpusTask((line,), (line.number,), generates=True) for line in missing]
        _count_tasks(run, job, tasks, pool)
        failed = run.failed.keys() & {line.number for line in missing}

    batches = _planned(run, work, failed, job)
    if batches:
        run.progress("starting the workers")
        _count_tasks(run, job, batches, pool)


def _unfinished_windows(run: Run, windows: Sequence[Sequence[Line]]) -> list[_Window]:
    """Count what is finished, report the invalid lines, and return the windows with something to do."""
    found = []
    for window in windows:
        valid = []
        for line in window:
            if line.error is None:
                valid.append(line)
            else:
                run.skip(line, line.error)
        unfinished = run.count_finished(valid)
        if unfinished:
            found.append(_Window(valid, unfinished))
    return found


def _lines_without_response(run: Run, work: Sequence[_Window], job: RayJob) -> list[Line]:
    """List the lines whose response has to be generated."""
    missing = []
    for window in work:
        for line, request in read_requests(job.path, window.lines, job.fields):
            if run.lacks_response(line, request):
                missing.append(line)
    return missing


def _planned(run: Run, work: Sequence[_Window], failed: set[int], job: RayJob) -> list[CorpusTask]:
    """Batch the lines of every window, as a run in one process does."""
    tasks = []
    for window in work:
        lines = [line for line in window.lines if line.number not in failed]
        batches = run.plan_window(_reader(job, lines), window.unfinished)
        for batch in batches:
            batch_lines = tuple(item.line for item in batch)
            unfinished = tuple(line.number for line in batch_lines if line.number in window.unfinished)
            tasks.append(CorpusTask(batch_lines, unfinished))
    return tasks


def _reader(job: RayJob, lines: list[Line]) -> Requests:
    """Return a function that reads the texts of some lines."""

    def requests() -> Iterator[Any]:
        return read_requests(job.path, lines, job.fields)

    return requests


def _count_tasks(run: Run, job: RayJob, tasks: Sequence[CorpusTask], pool: Pool) -> None:
    """Write the tasks to their file, run them, and count each line once."""
    lines = {line.number: line for task in tasks for line in task.lines}
    waiting = {number for task in tasks for number in task.unfinished}
    shown: set[str] = set()
    # Closed at once after Ctrl-C, so that the workers stop.
    with closing(run_tasks(job, _write_tasks(job, tasks), pool)) as outcomes:
        for outcome in outcomes:
            for text in outcome.warnings:
                if text not in shown:
                    shown.add(text)
                    warnings.warn(text, stacklevel=4)
            # A task that ran twice names its lines twice.
            for number in outcome.generated:
                if number in waiting:
                    waiting.remove(number)
                    run.progress("generating responses")
            for finished in outcome.finished:
                if finished.number in waiting:
                    waiting.remove(finished.number)
                    run.count(finished)
            for number, message in outcome.failed:
                if number in waiting:
                    waiting.remove(number)
                    run.skip(lines[number], message)
    if waiting:
        listed = ", ".join(map(str, sorted(waiting)[:_SHOWN_LINES]))
        raise ClusterError(
            f"ray: every line must come back from its worker, got none of {len(waiting)} (lines {listed}); run the "
            "same command again: it continues from here"
        )


def _write_tasks(job: RayJob, tasks: Sequence[CorpusTask]) -> list[tuple[int, int]]:
    """Write the tasks, one a line, and return offset and size of each."""
    texts = [task.to_text() for task in tasks]
    write_text(job.tasks, "".join(text + "\n" for text in texts))
    places = []
    start = 0
    for text in texts:
        # JSON escapes every character beyond ASCII, so characters are bytes.
        places.append((start, len(text)))
        start += len(text) + 1
    return places

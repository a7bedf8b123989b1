"""``flowgraph-rl align``: credit rules compared by the gradients they make."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph import MissingExtraError, OutputError
from rl.commands.terminal import console, table

if TYPE_CHECKING:
    from rl.alignment.multipliers import Alignment, Estimate

_STAGES: tuple[str, ...] = ("rollouts", "gradients")
_ARMS = "uniform,random,entropy,max_attention,flow,flow:soft,flow_entropy:soft"


def align_command(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model name, a folder, or 'chain' for the small one that is shipped.")
    ] = "chain",
    task: Annotated[str, typer.Option("--task", "-t", help="As for eval.")] = "chain",
    task_option: Annotated[
        list[str] | None, typer.Option("--task-option", help="NAME=VALUE, such as hops=[2,4]; may be repeated.")
    ] = None,
    arms: Annotated[
        str, typer.Option("--arms", help="RULE[:SHAPE][:NAME=VALUE,...], separated by commas; uniform is always there.")
    ] = _ARMS,
    baselines: Annotated[str, typer.Option("--baselines", help="Arms that all others are compared with.")] = "uniform",
    batches: Annotated[int, typer.Option("--batches", "-n", help="Batches; take at least 200.")] = 200,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="NAME=VALUE of PPOConfig, such as num_prompts=16; may be repeated."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", "-a", help="Measure this policy: a run, a checkpoint, or a PEFT folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of rollouts, adapter and rules that draw.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for alignment.json and alignment.png.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="'cpu', 'cuda', 'cuda:1' or 'mps'. Default: cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="'auto', 'float32', 'bfloat16' or 'float16', of the base.")] = "auto",
) -> None:  # fmt: skip
    """Compare credit rules by the policy gradients they make of the same rollouts; nothing is trained."""
    from rl.alignment.align import align
    from rl.alignment.arms import named_arms, split_arms
    from rl.commands.run_file import CHAIN_DEFAULTS, parse_options, policy_folder
    from rl.config import PPOConfig
    from rl.policy.loading import load_policy
    from rl.tasks.registry import make_task

    chosen = split_arms(arms)
    named_arms(chosen)  # a misspelt arm is refused before a model is loaded
    if out is not None:
        _make_folder(out)
    values = {"advantage": "group", **(CHAIN_DEFAULTS if model == "chain" else {})}
    config = PPOConfig.from_dict({**values, **parse_options(settings or [])})
    problems = make_task(task, **parse_options(task_option or []))
    folder = None if adapter is None else policy_folder(adapter)
    network, tokenizer = load_policy(model, dtype, device, folder)
    with _progress() as progress:
        found = align(
            network, tokenizer, problems, arms=chosen, config=config, num_batches=batches,
            baselines=split_arms(baselines), seed=seed, progress=progress,
        )  # fmt: skip
    print_alignment(found)
    if out is not None:
        _write(found, out)


def print_alignment(found: Alignment) -> None:
    """The tables, as text on the terminal."""
    screen = console()
    rows = table("arm", "multiplier", "95 %", "cosine", "error", figures=True)
    for arm in found.arms:
        estimate = arm.multiplier
        rows.add_row(
            arm.name, f"{estimate.corrected:.2f}", f"{estimate.low:.2f} to {estimate.high:.2f}",
            f"{arm.cosine.corrected:.3f}", f"{arm.cosine.error:.3f}",
        )  # fmt: skip
    screen.print(rows)
    rows = table("selected by", "tokens", "signal", "only these", "only the rest", "recall", "chance", figures=True)
    for arm in found.arms:
        if arm.signal_share is not None:
            rows.add_row(
                arm.name, _share(arm.token_share), _figure(arm.signal_share), _figure(arm.only_selected),
                _figure(arm.only_rest), _share(arm.recall), _share(arm.recall_chance),
            )  # fmt: skip
    screen.print(rows)
    if found.differences:
        rows = table("arm", "minus", "difference", "95 %", "p", "p (Holm)", figures=True)
        for pair in found.differences:
            low, high = pair.difference.low, pair.difference.high
            rows.add_row(
                pair.arm, pair.baseline, f"{pair.difference.corrected:+.2f}", f"{low:+.2f} to {high:+.2f}",
                f"{pair.p_value:.3f}", f"{pair.p_holm:.3f}",
            )  # fmt: skip
        screen.print(rows)
    seconds = sum(found.seconds.values())
    total = found.num_batches + found.no_signal
    screen.print(
        f"{found.num_batches} batches ({found.no_signal} more without signal), mean reward {found.reward:.3f}, "
        f"{found.response_tokens:.1f} tokens a response, {seconds / total:.2f} s a batch", highlight=False,
    )  # fmt: skip
    if not found.is_reliable:
        screen.print(
            "The cosine of uniform itself cannot be told from 0, so these ratios say nothing yet: take more batches.",
            style="yellow",
        )


def _figure(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.corrected:.2f} ({estimate.error:.2f})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _write(found: Alignment, folder: Path) -> None:
    from rl.alignment.plot import plot_alignment

    found.to_json(folder / "alignment.json")
    typer.echo(f"wrote {folder / 'alignment.json'}")
    try:
        typer.echo(f"wrote {plot_alignment(found, folder / 'alignment.png')}")
    except MissingExtraError as error:  # the figures are there; the picture is an extra
        typer.echo(f"no picture: {error}", err=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"out: must be a folder that can be made, got {folder} ({error.strerror}); choose another"
        ) from error


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage with rate and time left on a terminal; a plain line every ten seconds elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen, started, last = console(stderr=True), dict.fromkeys(_STAGES, 0.0), 0.0
    if not screen.is_terminal:
        started[_STAGES[0]] = time.monotonic()

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total and stage == _STAGES[0]:
                started[_STAGES[1]] = now
            if now - last > 10 or done == total:
                last, rate = now, (now - started[stage]) / done
                left = rate * (total - done)
                typer.echo(f"{stage} {done}/{total}: {rate:.2f} s a batch, {left:.0f} s left", err=True)

        yield progress
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )  # fmt: skip
    with Progress(*columns, console=screen) as bars:
        tasks = {stage: bars.add_task(stage, total=None, start=stage == _STAGES[0], rate="") for stage in _STAGES}

        def show(stage: str, done: int, total: int) -> None:
            bar = tasks[stage]
            elapsed = bars.tasks[bar].elapsed
            bars.update(bar, total=total, completed=done, rate=f"{elapsed / done:.2f} s a batch" if elapsed else "")
            if done == total and stage == _STAGES[0]:
                bars.start_task(tasks[_STAGES[1]])

        yield show

"""``flowgraph-rl align``: compare credit rules by their policy gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph import MissingExtraError
from rl.commands.options import Adapter, Device, Dtype, TaskModel, TaskName, TaskOption, make_folder
from rl.commands.terminal import console, table

if TYPE_CHECKING:
    from rich.console import Console

    from rl.alignment.multipliers import Alignment, Estimate

_ROLLOUTS = "rollouts"
_GRADIENTS = "gradients"
_DEFAULT_ARMS = "uniform,random,entropy,max_attention,flow,flow:soft,flow_entropy:soft"
_SECONDS_BETWEEN_LINES = 10

Progress = Callable[[str, int, int], None]
"""Called with the stage, the batches that are done, and the batches to do."""


def align_command(
    model: TaskModel = None,
    task: TaskName = "chain",
    task_option: TaskOption = None,
    arms: Annotated[
        str,
        typer.Option("--arms", help="RULE[:SHAPE][:NAME=VALUE,...], separated by commas; uniform is always measured."),
    ] = _DEFAULT_ARMS,
    baselines: Annotated[str, typer.Option("--baselines", help="Arms that all others are compared with.")] = "uniform",
    batches: Annotated[int, typer.Option("--batches", "-n", help="Batches; take at least 200.")] = 200,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="NAME=VALUE of PPOConfig, such as num_prompts=16; may be repeated."),
    ] = None,
    adapter: Adapter = None,
    seed: Annotated[int, typer.Option(help="Seed of rollouts, adapter and rules that draw random numbers.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for alignment.json and alignment.png.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Compare credit rules by their policy gradients on the same rollouts; nothing is trained."""
    from rl.alignment.align import align
    from rl.alignment.arms import named_arms, split_arms
    from rl.commands.rollout_settings import rollout_config
    from rl.commands.run_file import optional_policy_folder, parse_options
    from rl.policy.loading import load_policy
    from rl.policy.shipped_models import default_model
    from rl.tasks.registry import make_task

    # Check the input before the model is loaded: a misspelt arm ends here.
    chosen = split_arms(arms)
    named_arms(chosen)
    if out is not None:
        make_folder(out)
    model = model or default_model(task)
    config = rollout_config(model, {}, settings or [])
    problems = make_task(task, **parse_options(task_option or [], flag="--task-option"))
    folder = optional_policy_folder(adapter)

    network, tokenizer = load_policy(model, dtype, device, folder)
    with _progress() as progress:
        alignment = align(
            network,
            tokenizer,
            problems,
            arms=chosen,
            config=config,
            num_batches=batches,
            baselines=split_arms(baselines),
            seed=seed,
            progress=progress,
        )
    print_alignment(alignment)
    if out is not None:
        _write(alignment, out)


def print_alignment(alignment: Alignment) -> None:
    """Print multipliers, selected tokens and differences as tables, and the size of the run."""
    screen = console()
    _print_multipliers(screen, alignment)
    _print_selections(screen, alignment)
    if alignment.differences:
        _print_differences(screen, alignment)

    num_batches = alignment.num_batches + alignment.no_signal
    seconds_per_batch = sum(alignment.seconds.values()) / num_batches
    screen.print(
        f"{alignment.num_batches} batches ({alignment.no_signal} more without signal), "
        f"mean reward {alignment.reward:.3f}, {alignment.response_tokens:.1f} tokens a response, "
        f"{seconds_per_batch:.2f} s a batch",
        highlight=False,
    )
    screen.print("The multiplier is no forecast of training: see flowgraph-rl auc and the page on credit rules.")
    if not alignment.is_reliable:
        screen.print(
            "The cosine of uniform cannot be told from 0, so these ratios are not meaningful yet: take more batches.",
            style="yellow",
        )


def _print_multipliers(screen: Console, alignment: Alignment) -> None:
    """Print multiplier and cosine of every arm."""
    rows = table("arm", "multiplier", "95 %", "on decisive tokens", "95 %", "cosine", "error", figures=True)
    for arm in alignment.arms:
        rows.add_row(
            arm.name,
            f"{arm.multiplier.corrected:.2f}",
            f"{arm.multiplier.low:.2f} to {arm.multiplier.high:.2f}",
            *_format_decisive(arm.decisive_multiplier),
            f"{arm.cosine.corrected:.3f}",
            f"{arm.cosine.error:.3f}",
        )
    screen.print(rows)


def _print_selections(screen: Console, alignment: Alignment) -> None:
    """Print what the selected tokens of every arm carry; arms without selected tokens have no row."""
    rows = table("selected by", "tokens", "signal", "only these", "only the rest", "recall", "chance", figures=True)
    for arm in alignment.arms:
        if arm.signal_share is None:
            continue
        rows.add_row(
            arm.name,
            _format_share(arm.token_share),
            _format_estimate(arm.signal_share),
            _format_estimate(arm.only_selected),
            _format_estimate(arm.only_rest),
            _format_share(arm.recall),
            _format_share(arm.recall_chance),
        )
    screen.print(rows)


def _print_differences(screen: Console, alignment: Alignment) -> None:
    """Print the difference of every arm to every baseline."""
    rows = table("arm", "minus", "difference", "95 %", "p", "p (Holm)", figures=True)
    for pair in alignment.differences:
        rows.add_row(
            pair.arm,
            pair.baseline,
            f"{pair.difference.corrected:+.2f}",
            f"{pair.difference.low:+.2f} to {pair.difference.high:+.2f}",
            f"{pair.p_value:.3f}",
            f"{pair.p_holm:.3f}",
        )
    screen.print(rows)


def _format_decisive(estimate: Estimate | None) -> tuple[str, str]:
    """Format a multiplier and its interval as two cells."""
    if estimate is None:
        return "-", "-"
    return f"{estimate.corrected:.2f}", f"{estimate.low:.2f} to {estimate.high:.2f}"


def _format_estimate(estimate: Estimate | None) -> str:
    """Format a value with its standard error."""
    if estimate is None:
        return "-"
    return f"{estimate.corrected:.2f} ({estimate.error:.2f})"


def _format_share(value: float | None) -> str:
    """Format a share in per cent."""
    if value is None:
        return "-"
    return f"{value:.0%}"


def _write(alignment: Alignment, folder: Path) -> None:
    """Write the figures, and the picture where matplotlib is installed."""
    from rl.alignment.plot import plot_alignment

    alignment.to_json(folder / "alignment.json")
    typer.echo(f"wrote {folder / 'alignment.json'}")
    try:
        picture = plot_alignment(alignment, folder / "alignment.png")
    except MissingExtraError as error:
        typer.echo(f"no picture: {error}", err=True)
    else:
        typer.echo(f"wrote {picture}")


@contextmanager
def _progress() -> Iterator[Progress]:
    """Yield a callback that shows the progress: bars on a terminal, plain lines elsewhere."""
    screen = console(stderr=True)
    if screen.is_terminal:
        with _progress_bars(screen) as show:
            yield show
    else:
        yield _progress_lines()


def _progress_lines() -> Progress:
    """Return a callback that prints a line every ten seconds and at the end of each stage."""
    started = {_ROLLOUTS: time.monotonic()}
    last_line = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last_line
        now = time.monotonic()
        # The second stage starts when the first one ends.
        if stage == _ROLLOUTS and done == total:
            started[_GRADIENTS] = now
        if now - last_line <= _SECONDS_BETWEEN_LINES and done != total:
            return
        last_line = now
        rate = (now - started[stage]) / done
        left = rate * (total - done)
        typer.echo(f"{stage} {done}/{total}: {rate:.2f} s a batch, {left:.0f} s left", err=True)

    return show


@contextmanager
def _progress_bars(screen: Console) -> Iterator[Progress]:
    """Yield a callback that moves a bar for each stage, with seconds per batch and time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=screen) as bars:
        bar_of = {
            _ROLLOUTS: bars.add_task(_ROLLOUTS, total=None, rate=""),
            _GRADIENTS: bars.add_task(_GRADIENTS, total=None, start=False, rate=""),
        }

        def show(stage: str, done: int, total: int) -> None:
            bar = bar_of[stage]
            elapsed = bars.tasks[bar].elapsed
            rate = f"{elapsed / done:.2f} s a batch" if elapsed else ""
            bars.update(bar, total=total, completed=done, rate=rate)
            # The clock of the second stage starts when the first one ends.
            if stage == _ROLLOUTS and done == total:
                bars.start_task(bar_of[_GRADIENTS])

        yield show

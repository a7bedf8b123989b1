"""Section "noise": what one generated token costs in random numbers, by the sampler of ``rl`` and by other ways."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import internals
from benchmarks.gpu.context import Context
from benchmarks.gpu.record import Record
from benchmarks.gpu.timing import measure

TEMPERATURE = 1.0


def run(context: Context, record: Record) -> None:
    """Time one sampling step of all sequences, way by way; none of them includes the model."""
    sequences = context.sized(64, 4)
    vocabulary = context.sized(151936, 512)
    record.notes.update(
        sequences=sequences,
        vocabulary=vocabulary,
        meaning="seconds from the logits of one position to one token for each sequence",
    )
    logits = torch.randn(sequences, vocabulary, generator=context.generator(20)).to(context.device)
    for name, sample in _ways(context, logits).items():
        record.attempt(name, partial(_measure_way, context, record, name, sample))
    record.attempt("same distribution", lambda: _check_distribution(context, record))


def _measure_way(context: Context, record: Record, name: str, make: Callable[[], Callable[[], Tensor]]) -> None:
    sample = make()
    timing = measure(sample, context.device, repeats=context.sized(20, 5), limit=context.left() / 4)
    record.row(way=name, **timing, per_sequence_us=1e6 * timing["median_s"] / len(sample()))
    context.say(f"noise: {name}: {1e3 * timing['median_s']:.2f} ms a token")


def _ways(context: Context, logits: Tensor) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Functions that make a sampling step, by name."""

    def of_rl() -> Callable[[], Tensor]:
        noise = internals.sampling_noise(range(len(logits)), TEMPERATURE)
        no_ids = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
        return lambda: noise(no_ids, logits).argmax(-1)

    def multinomial() -> Callable[[], Tensor]:
        return lambda: torch.multinomial(torch.softmax(logits / TEMPERATURE, -1), 1).squeeze(-1)

    def one_stream() -> Callable[[], Tensor]:
        generator = torch.Generator(logits.device).manual_seed(context.seed)
        noise = torch.empty_like(logits)
        return lambda: _perturbed(logits, noise.exponential_(generator=generator)).argmax(-1)

    def stream_per_sequence() -> Callable[[], Tensor]:
        generators = [torch.Generator(logits.device).manual_seed(context.seed + n) for n in range(len(logits))]
        noise = torch.empty_like(logits)

        def sample() -> Tensor:
            for row, generator in zip(noise, generators, strict=True):
                row.exponential_(generator=generator)
            return _perturbed(logits, noise).argmax(-1)

        return sample

    return {
        "rl: a hash of seed, position and token, on the device": of_rl,
        "multinomial on the device": multinomial,
        "one stream on the device": one_stream,
        "one stream per sequence, drawn on the device": stream_per_sequence,
    }


def _perturbed(logits: Tensor, exponential: Tensor) -> Tensor:
    """Logits plus Gumbel noise, minus the logarithm of an exponential draw; its largest entry is a sample."""
    return logits / TEMPERATURE - exponential.clamp_min(torch.finfo(torch.float32).tiny).log()


def _check_distribution(context: Context, record: Record) -> None:
    """The sampler of rl draws from the softmax: frequencies of a small vocabulary within five standard errors."""
    draws = 4096
    one_position = torch.tensor([0.0, 1.0, -1.0, 2.0], device=context.device)
    noise = internals.sampling_noise(range(draws), TEMPERATURE)
    no_ids = torch.empty(draws, 0, dtype=torch.int64, device=context.device)
    samples = noise(no_ids, one_position.expand(draws, -1)).argmax(-1)

    found = torch.bincount(samples, minlength=one_position.numel()).double() / draws
    expected = torch.softmax(one_position.double(), -1)
    standard_error = (expected * (1 - expected) / draws).sqrt()
    error = (found - expected).abs() / standard_error
    record.check("samples of rl follow the softmax, in standard errors", float(error.max()), 5.0)

"""Section "credit": what token credit costs beside a training step of a model of Qwen3-4B's shape.

A training step here is what one update needs of the model after a rollout: the pass that scores the responses under
the old policy (no gradient), and one forward and one backward pass of the policy loss over LoRA adapters. Generation,
the critic, the reference and the optimizer are left out: with them the share of the credit is smaller.

The credit is what flowgraph adds: the difference that recording makes to the scoring pass, and the solve (rows
recomputed from the recorded queries and keys, both sweeps, weights, the copy to the CPU). All passes are those of
``rl``: the policy is an ``rl.ActorCritic``, log-probabilities come from ``rl.token_logprobs``, layers are the middle
third, and rows of prompts that responses share are computed once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flowgraph as fg
import rl
from benchmarks.gpu import internals, models
from benchmarks.gpu.context import Context
from benchmarks.gpu.inputs import largest_unit_error
from benchmarks.gpu.record import Record, describe
from benchmarks.gpu.timing import GIB, alternate, free_bytes, measure, peak_gib, release

DEFINITIONS = {
    "step": "scoring pass + forward and backward pass of the policy loss over LoRA adapters; no generation, critic, "
    "reference or optimizer",
    "credit": "(scoring pass while recorded - scoring pass) + solve",
    "solve": "rows from the recorded queries and keys, both sweeps, weights, copy to the CPU",
    "credit_percent_of_step": "100 * credit / step",
    "credit_percent_of_one_pass_step": "100 * credit / (forward and backward pass): where one update follows a "
    "rollout, rl scores and learns in one pass",
}
ANSWER_TOKENS = 8
_USABLE = 0.8
"""Share of the free memory that an estimate may ask for."""
_SCRATCH_SIZES = (2**28, 2**30)
"""Sizes of the softmax scratch that are tried beside the one in use."""


@dataclass(frozen=True)
class Case:
    """Responses to score.

    Attributes:
        sequences, tokens: shape of the batch.
        prompt: tokens of each prompt, padding included.
        group: responses of one prompt.
        padded: whether prompts and responses differ in length, which takes the fused kernels' causal path away.
        checkpointing: gradient checkpointing, or None to decide by an estimate.
    """

    sequences: int
    tokens: int
    prompt: int
    group: int
    padded: bool = False
    checkpointing: bool | None = None

    @property
    def name(self) -> str:
        padding = ", padded" if self.padded else ""
        return f"{self.tokens} tokens x {self.sequences}{padding}"

    @property
    def response(self) -> int:
        """Tokens of each response, padding included."""
        return self.tokens - self.prompt


CASES = (Case(16, 1024, 256, 4), Case(2, 8192, 1024, 2), Case(16, 1024, 256, 4, padded=True))
TOY_CASES = (Case(4, 48, 16, 2), Case(2, 64, 16, 2, padded=True, checkpointing=True))


@dataclass(frozen=True)
class Tokens:
    """Ids, masks and regions of a case, on the device.

    Attributes:
        input_ids, attention_mask, position_ids: ``[sequences, tokens]`` int64.
        question, answer, generated: ``[sequences, tokens]`` bool.
        response_mask: ``[sequences, response]`` bool, without padding.
        prompt: number of prompt columns.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    question: Tensor
    answer: Tensor
    generated: Tensor
    response_mask: Tensor
    prompt: int

    @property
    def responses(self) -> Tensor:
        """``[sequences, response]`` ids of the response columns."""
        return self.input_ids[:, self.prompt :]


def run(context: Context, record: Record) -> None:
    """Measure every case; its passes, solve and training pass are parts of their own."""
    model = context.model()
    record.notes.update(DEFINITIONS, model=models.shape_of(model))
    with borrowed_policy(model, context) as policy:
        record.notes["lora"] = {
            "rank": rl.LoraConfig().rank,
            "targets": rl.LoraConfig().targets,
            "parameters": sum(weight.numel() for weight in policy.policy_parameters().values()),
            "dtype": str(next(iter(policy.policy_parameters().values())).dtype),
        }
        cases = context.sized(CASES, TOY_CASES)
        for number, case in enumerate(cases):
            # Cases share the time that is left equally, so that a slow first one leaves something to the others.
            seconds = context.left() / (len(cases) - number)
            _measure_case(context, record, policy, case, seconds)


def _measure_case(context: Context, record: Record, policy: Any, case: Case, seconds: float) -> None:
    """Fill one row, part by part, so that a part that fails leaves the others' figures."""
    needs = context.sized(5.0, 0.0)
    bench = record.attempt(
        f"{case.name}: inputs", lambda: CreditBench(policy, make_tokens(case, policy.causal_lm, context)), needs=needs
    )
    if bench is None:
        return
    row: dict[str, Any] = {
        "case": case.name, "sequences": case.sequences, "tokens": case.tokens, "prompt": case.prompt,
        "response": case.response, "group": case.group, "padded": case.padded, "peak_gib": {},
    }  # fmt: skip
    record.rows.append(row)
    parts: tuple[tuple[str, Callable[..., None], float], ...] = (
        ("scoring", _measure_scoring, 0.15),
        ("recording", _measure_recording, 0.25),
        ("solve", _measure_solve, 0.2),
        ("other scratch sizes", _measure_scratch, 0.1),
        ("training", _measure_training, 0.3),
    )
    for name, part, share in parts:
        run_part = partial(part, context, record, case, bench, row, limit=share * seconds)
        record.attempt(f"{case.name}: {name}", run_part, needs=needs)
    bench.forget()
    _relate(context, row)


def _relate(context: Context, row: dict[str, Any]) -> None:
    """The cost as defined above; where a part of it is missing, so is the cost."""
    if not {"recording_s", "solve", "training"} <= row.keys():
        return
    credit_s = row["recording_s"] + row["solve"]["median_s"]
    training_s = row["training"]["timing"]["median_s"]
    step_s = row["scoring"]["median_s"] + training_s
    row["credit_s"] = credit_s
    row["step_s"] = step_s
    row["credit_percent_of_step"] = 100 * credit_s / step_s
    row["credit_percent_of_one_pass_step"] = 100 * credit_s / training_s
    percent = row["credit_percent_of_step"]
    context.say(f"credit: {row['case']}: {1e3 * credit_s:.1f} ms, {percent:.1f} % of a step of {1e3 * step_s:.0f} ms")


def _measure_scoring(
    context: Context, record: Record, case: Case, bench: CreditBench, row: dict[str, Any], *, limit: float
) -> None:
    """The scoring pass by itself."""
    row["scoring"] = measure(bench.score, context.device, repeats=_repeats(context), limit=limit)
    row["peak_gib"]["scoring"] = peak_gib(bench.score, context.device)
    context.say(f"credit: {case.name}: scoring {_shown(row['scoring'])}")


def _measure_recording(
    context: Context, record: Record, case: Case, bench: CreditBench, row: dict[str, Any], *, limit: float
) -> None:
    """The scoring pass with and without a recorder, in turns."""
    bench.score()
    plain = bench.scores
    runs = {"scoring": bench.score, "scoring_recorded": bench.score_recorded}
    passes = alternate(runs, context.device, repeats=_repeats(context), limit=limit)
    row.update(passes)
    # A difference of medians below zero is noise, and is kept as it is.
    row["recording_s"] = passes["scoring_recorded"]["median_s"] - passes["scoring"]["median_s"]
    bench.forget()
    row["peak_gib"]["scoring_recorded"] = peak_gib(bench.score_recorded, context.device)
    row["recorder_seconds"] = bench.recorder_seconds
    context.say(f"credit: {case.name}: recorded {_shown(row['scoring_recorded'])}")
    same_logprobs = torch.equal(bench.scores[0], plain[0])
    same_entropy = torch.equal(bench.scores[1], plain[1])
    record.require(f"{case.name}: scores are the same bits while recorded", same_logprobs and same_entropy)


def _measure_solve(
    context: Context, record: Record, case: Case, bench: CreditBench, row: dict[str, Any], *, limit: float
) -> None:
    """The solve, from what the last recorded pass left behind; the flow must be whole on every sequence."""
    row["solve"] = measure(bench.solve, context.device, repeats=_repeats(context), limit=limit)
    row["peak_gib"]["solve"] = peak_gib(bench.solve, context.device)
    row["layers"] = list(bench.layers)
    context.say(f"credit: {case.name}: solve {_shown(row['solve'])}")

    # What is provable of any flow, as far as it can be seen without the edges.
    flow = bench.flow
    entered = flow.source.sum(-1)
    record.require(f"{case.name}: every sequence has a flow", bool(flow.feasible.all()))
    record.check(f"{case.name}: one unit enters", float((entered - 1).abs().max()), 1e-9)
    record.check(f"{case.name}: one unit leaves", largest_unit_error(flow), 1e-9)
    record.check(f"{case.name}: throughput is at most 1", float(flow.throughput.max()), 1 + 1e-9)


def _measure_scratch(
    context: Context, record: Record, case: Case, bench: CreditBench, row: dict[str, Any], *, limit: float
) -> None:
    """The solve with other sizes of the softmax scratch, whose size in use was chosen for the caches of a CPU."""
    sizes = context.sized(_SCRATCH_SIZES, (2**16,))
    row["scratch_bytes_in_use"] = internals.value_of(internals.SCRATCH_BYTES)
    row["solve_by_scratch_bytes"] = {}
    for size in sizes:
        with internals.setting(internals.SCRATCH_BYTES, size):
            timing = measure(bench.solve, context.device, repeats=3, limit=limit / len(sizes))
        row["solve_by_scratch_bytes"][size] = timing
        context.say(f"credit: {case.name}: solve with {size / 2**20:g} MiB of scratch {_shown(timing)}")


class CreditBench:
    """The passes of one case as functions without arguments.

    Args:
        policy: an ``rl.ActorCritic``.
        tokens: of the case.
    """

    def __init__(self, policy: Any, tokens: Tokens) -> None:
        self.policy = policy
        self.tokens = tokens
        self.model = policy.causal_lm
        self.scores: tuple[Tensor, ...] = ()
        self.flow: Any = None
        self.weights: Tensor | None = None
        self.layers: tuple[int, ...] = ()
        self.recorder_seconds = 0.0
        self._recorder: Any = None

    def logprobs(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of the response tokens of some sequences; logits of responses alone."""
        tokens = self.tokens
        response_length = tokens.responses.shape[1]
        logits = self.model(
            input_ids=tokens.input_ids[rows],
            attention_mask=tokens.attention_mask[rows],
            position_ids=tokens.position_ids[rows],
            logits_to_keep=response_length + 1,
            use_cache=False,
        ).logits
        return rl.token_logprobs(logits[:, -response_length - 1 : -1], tokens.responses[rows], 1.0)

    def score(self) -> None:
        """The scoring pass."""
        with torch.no_grad():
            logprobs, entropy = self.logprobs()
        self.scores = (logprobs.float().cpu(), entropy.float().cpu())

    def score_recorded(self) -> None:
        """The scoring pass while its attention is recorded."""
        self._recorder = None  # what the last pass left behind is freed first
        with fg.AttentionRecorder(self.model) as recorder:
            self.score()
        self._recorder = recorder
        self.recorder_seconds = recorder.seconds

    def solve(self) -> None:
        """Credit weights from the last recorded pass."""
        tokens = self.tokens
        if self._recorder is None:
            raise RuntimeError("no pass was recorded, so there is nothing to solve")
        rows = self._recorder.rows(tokens.attention_mask, tokens.input_ids)
        self.layers = rows.layers
        self.flow = fg.solve_rows(
            rows,
            question=tokens.question,
            answer=tokens.answer,
            generated=tokens.generated,
            rules=fg.EdgeRules(rows="emission"),
        )
        # Reasoning tokens compete; the answer does not.
        scored = tokens.response_mask & ~tokens.answer[:, tokens.prompt :]
        throughput = self.flow.throughput[:, tokens.prompt :].float()
        scores = throughput.masked_fill(~scored, 0.0)
        self.weights = rl.shape_weights(scores, scored, rl.CreditConfig()).cpu()

    def train(self, rows_at_once: int) -> None:
        """Forward and backward pass of the clipped policy loss over the adapters, in micro-batches; adds gradients."""
        mask = self.tokens.response_mask
        num_sequences, response_length = mask.shape
        advantages = torch.ones(mask.shape, device=mask.device)
        for start in range(0, num_sequences, rows_at_once):
            rows = slice(start, start + rows_at_once)
            logprobs, _ = self.logprobs(rows)
            # The policy is the one that wrote the tokens, so the ratio is 1 and nothing is clipped.
            kept = torch.where(mask[rows], logprobs, 0.0)
            losses = rl.policy_loss(kept, kept.detach(), advantages[rows], clip=0.2)
            loss = rl.aggregate(
                losses.per_token,
                mask[rows],
                "token_mean",
                num_tokens=float(mask.numel()),
                num_sequences=num_sequences,
                max_tokens=response_length,
            )
            loss.backward()

    def gradient_sum(self) -> float:
        """Sum of the absolute gradients of all adapter weights."""
        weights = self.policy.policy_parameters().values()
        sums = [weight.grad.abs().sum() for weight in weights if weight.grad is not None]
        return float(torch.stack(sums).sum())

    def forget_gradients(self) -> None:
        for weight in self.policy.policy_parameters().values():
            weight.grad = None

    def forget(self) -> None:
        """Free what the passes left behind, so that the training pass has the memory to itself."""
        self.scores = ()
        self.flow = None
        self.weights = None
        self._recorder = None
        release(self.tokens.input_ids.device)


# Training -------------------------------------------------------------------------------------------------------


def _measure_training(
    context: Context, record: Record, case: Case, bench: CreditBench, row: dict[str, Any], *, limit: float
) -> None:
    """Time the training pass in the first way that fits the memory; the ways tried before it are listed."""
    bench.forget()  # the training pass needs the most memory
    config = bench.model.config
    free = free_bytes(context.device)
    plain_bytes = training_bytes(config, case, checkpointing=False)
    fits = plain_bytes < _USABLE * free
    checkpointing = not fits if case.checkpointing is None else case.checkpointing
    rows_at_once = case.sequences
    tried: list[str] = []
    while True:
        mode = f"gradient checkpointing {'on' if checkpointing else 'off'}, {rows_at_once} sequences at once"
        found = _try_training(context, bench, rows_at_once, checkpointing, limit)
        if isinstance(found, dict):
            break
        tried.append(f"{mode}: {found}")
        if checkpointing and rows_at_once == 1:
            raise torch.OutOfMemoryError("; ".join(tried))
        # The estimate was too low: first checkpointing, then fewer sequences at once.
        if checkpointing:
            rows_at_once = rows_at_once // 2
        checkpointing = True
    row["training"] = {
        **found,
        "mode": mode,
        "checkpointing": checkpointing,
        "rows_at_once": rows_at_once,
        "estimate_without_checkpointing_gib": plain_bytes / GIB,
        "estimate_with_checkpointing_gib": training_bytes(config, case, checkpointing=True) / GIB,
        "free_gib": free / GIB,
        "out_of_memory": tried,
    }
    context.say(f"credit: {case.name}: forward and backward {_shown(found['timing'])}, {mode}")
    gradient = found["gradient_sum"]
    record.require(f"{case.name}: the gradient is finite and not zero", gradient > 0 and gradient < float("inf"))


def _try_training(
    context: Context, bench: CreditBench, rows_at_once: int, checkpointing: bool, limit: float
) -> dict[str, Any] | str:
    """Time, peak memory and gradient of the training pass; the message where it does not fit the memory."""

    def once() -> None:
        bench.forget_gradients()
        bench.train(rows_at_once)

    try:
        with _training_mode(bench.model, checkpointing):
            timing = measure(once, context.device, repeats=min(_repeats(context), 3), limit=limit)
            peak = peak_gib(once, context.device)
        return {"timing": timing, "peak_gib": peak, "gradient_sum": bench.gradient_sum()}
    except torch.OutOfMemoryError as error:
        message = describe(error)
    finally:
        bench.forget_gradients()
    # Outside of the handler the failed pass is gone, and its memory can be freed.
    release(context.device)
    return message


def training_bytes(config: Any, case: Case, *, checkpointing: bool) -> float:
    """Estimate what a training pass over all sequences keeps until its backward pass.

    Counted per token and layer, for a frozen bfloat16 base: the inputs and outputs of norms, rotary embedding,
    attention and the gated MLP in 2 bytes, and the inputs of the adapters in 4, which PEFT casts to float32. Logits of
    the responses, their gradient before and after slicing, and float32 temporaries of one response come on top. With
    checkpointing one input a layer stays, and one layer is recomputed at a time.
    """
    hidden = config.hidden_size
    inner = config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    base = 2 * (10 * hidden + 6 * query + 8 * key + 4 * inner)
    adapters = 4 * (5 * hidden + query + inner)
    num_tokens = case.sequences * case.tokens
    one_layer = num_tokens * (base + adapters)
    layers = config.num_hidden_layers
    activations = layers * one_layer
    if checkpointing:
        activations = layers * num_tokens * 2 * hidden + one_layer
    per_vocabulary_entry = 3 * 2 * case.sequences + 3 * 4
    return activations + config.vocab_size * case.response * per_vocabulary_entry


@contextmanager
def _training_mode(model: Any, checkpointing: bool) -> Iterator[None]:
    """Gradient checkpointing works in training mode only; the model has no dropout, so nothing else changes."""
    if not checkpointing:
        yield
        return
    with warnings.catch_warnings():
        # The newest transformers have another name for it, which the oldest supported ones do not know.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        try:
            yield
        finally:
            model.eval()
            model.gradient_checkpointing_disable()


@contextmanager
def borrowed_policy(model: Any, context: Context) -> Iterator[Any]:
    """The model as ``rl``'s policy with fresh adapters; afterwards without them."""
    policy = rl.ActorCritic(model, rl.LoraConfig(), critic=False, seed=context.seed)
    try:
        yield policy
    finally:
        policy.peft.unload()
        model.requires_grad_(False)
        release(context.device)


# Inputs ---------------------------------------------------------------------------------------------------------


def make_tokens(case: Case, model: Any, context: Context) -> Tokens:
    """Random ids in groups that share a prompt, with the regions of a rollout.

    Where a case is padded, prompts are padded on the left and responses on the right.
    """
    generator = context.generator(10)
    vocabulary = model.config.vocab_size
    shape = (case.sequences, case.tokens)
    input_ids = torch.randint(3, vocabulary, shape, generator=generator)
    position = torch.arange(case.tokens).expand(shape)
    # The responses of a group repeat the prompt of its first.
    group_start = torch.arange(case.sequences) // case.group * case.group
    input_ids[:, : case.prompt] = input_ids[group_start, : case.prompt]

    first = torch.zeros(case.sequences, dtype=torch.int64)
    last = torch.full((case.sequences,), case.tokens - 1)
    if case.padded:
        # Responses of one prompt share its padding too.
        left = torch.randint(1, case.prompt // 2, (case.sequences,), generator=generator)
        right = torch.randint(0, case.response // 3, (case.sequences,), generator=generator)
        first = left[group_start]
        last = last - right
    inside = (position >= first[:, None]) & (position <= last[:, None])
    input_ids[~inside] = 0
    is_response = inside & (position >= case.prompt)
    regions = {
        "question": inside & (position > first[:, None]) & (position < case.prompt),
        "answer": is_response & (position > last[:, None] - ANSWER_TOKENS),
        "generated": is_response,
    }
    attention_mask = inside.long()
    tensors = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0),
        "response_mask": is_response[:, case.prompt :],
        **regions,
    }
    return Tokens(**{name: tensor.to(context.device) for name, tensor in tensors.items()}, prompt=case.prompt)


def _repeats(context: Context) -> int:
    return context.sized(5, 2)


def _shown(timing: dict[str, Any]) -> str:
    return f"{1e3 * timing['median_s']:.1f} ms ({1e3 * timing['min_s']:.1f} to {1e3 * timing['max_s']:.1f})"

"""From problems to responses with their regions and rewards; text meets token positions here and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad

from flowgraph import (
    EncodedText,
    FlowgraphError,
    NoAnswerError,
    context_length,
    encode,
    final_part,
    find_question,
    find_regions,
    response_opening,
)
from rl.config import stop_string_list
from rl.errors import PolicyError, RewardError, TaskError, describe_cause
from rl.policy.sampling import Ending, Generated, generate, vocabulary_size
from rl.records import CharSpan, Responses, Sample
from rl.seeds import derive
from rl.tasks.base import BatchTask, DetourTask, Task
from rl.tasks.rewards import RewardParts, batch_rewards, checked_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHOWN_PROBLEMS = 5
"""Problems that a message lists by number."""


class PromptEncoder:
    """Prompts as token ids, checked against the budget and the model's context.

    Args:
        tokenizer: of the model.
        model: its context length is read.
        max_prompt_tokens: longer prompts are refused.
        max_response_tokens: tokens of the context that must be left for the response.
        stop_strings: texts that end a response, beside the end tokens.

    Attributes:
        tokenizer: of the model.
        ending: the tokens and texts that end a response.

    Raises:
        PolicyError: the context is too short for a prompt and a response.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        max_prompt_tokens: int,
        max_response_tokens: int,
        stop_strings: str | Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.ending = Ending.of(model, tokenizer, stop_string_list(stop_strings))
        self._vocabulary_size = vocabulary_size(model)

        # The limit is the smaller of the budget and what the context leaves; messages name the one that applies.
        self._limit = max_prompt_tokens
        self._limit_origin = f"max_prompt_tokens={max_prompt_tokens}"
        context = context_length(model)
        if context is not None and context - max_response_tokens < max_prompt_tokens:
            self._limit = context - max_response_tokens
            self._limit_origin = f"the model's context of {context} minus max_response_tokens={max_response_tokens}"
        if self._limit < 1:
            raise PolicyError(
                f"max_response_tokens: must leave room for a prompt, got {max_response_tokens} with a context of "
                f"{context} tokens; set it below {context}"
            )

    def ids(self, sample: Sample) -> list[int]:
        """Encode the prompt of a problem.

        Raises:
            PolicyError: the prompt is too long, or holds a token without an embedding in the model.
        """
        ids = self._encoded(sample)
        if len(ids) > self._limit:
            raise PolicyError(
                f"prompt: sample {sample.index} must have at most {self._limit} tokens ({self._limit_origin}), got "
                f"{len(ids)}; raise the limit, or leave the problem out"
            )
        # An id beyond the embeddings would fail inside the model, on a GPU without a readable message.
        if max(ids) >= self._vocabulary_size:
            raise PolicyError(
                f"tokenizer: must be that of the model, got id {max(ids)} in sample {sample.index}, and the model has "
                f"{self._vocabulary_size} embeddings; load both from one folder, or call model.resize_token_embeddings"
            )
        return ids

    def check(self, samples: Iterable[Sample]) -> None:
        """Refuse problems whose prompts are too long, before a run reaches them.

        Raises:
            PolicyError: the message has the number of such prompts and lists the first.
        """
        lengths = {sample.index: len(self._encoded(sample)) for sample in samples}
        too_long = [index for index, length in lengths.items() if length > self._limit]
        if too_long:
            shown = ", ".join(str(index) for index in too_long[:_SHOWN_PROBLEMS])
            if len(too_long) > _SHOWN_PROBLEMS:
                shown += ", ..."
            raise PolicyError(
                f"prompt: every problem must have at most {self._limit} tokens ({self._limit_origin}), got "
                f"{len(too_long)} of {len(lengths)} that are longer, up to {max(lengths.values())} (numbers {shown}); "
                "raise the limit, or leave them out"
            )

    def _encoded(self, sample: Sample) -> list[int]:
        """Encode a prompt as it is in front of a response, which some tokenizers encode differently."""
        encoded = encode(self.tokenizer, sample.prompt, [self.ending.end_ids[0]])
        return encoded.input_ids[: encoded.prompt_length].tolist()


def draw_samples(task: Task, split: str, indices: Iterable[int]) -> list[Sample]:
    """Draw problems of a task by number.

    Args:
        task: see :class:`rl.tasks.base.Task`.
        split: ``"train"`` or ``"eval"``.
        indices: numbers of the problems.

    Raises:
        TaskError: the task raised, or returned something else than the problem of that number.
    """
    samples = []
    for index in indices:
        try:
            sample = task.sample(split, index)
        except FlowgraphError:
            raise
        except (Exception, SystemExit) as error:
            # A task is user code and may raise anything; the message names the problem.
            raise TaskError(
                "task: must have a problem for every number, got "
                f"{describe_cause(error, f'for number {index} of {split!r}')}; correct the task"
            ) from error
        if inspect.iscoroutine(sample):
            # An open coroutine makes Python warn later that it was never awaited.
            sample.close()
        # Responses are grouped by this number.
        if not isinstance(sample, Sample) or sample.index != index:
            got = f"number {sample.index}" if isinstance(sample, Sample) else f"a {type(sample).__name__}"
            raise TaskError(
                f"task: must return a Sample with the number asked for, got {got} for number {index} of {split!r}; "
                "pass index=index, also where a finite task starts again"
            )
        samples.append(sample)
    return samples


def sample_responses(
    model: PreTrainedModel,
    encoder: PromptEncoder,
    samples: Sequence[Sample],
    *,
    group_size: int,
    max_response_tokens: int,
    temperature: float,
    seed: int,
    step: int,
    batch_size: int | None = None,
) -> Generated:
    """Sample ``group_size`` responses to each problem; those of one problem are adjacent.

    The noise of response k to problem i of a step is a function of (seed, step, i, k) alone.

    Args:
        model: a causal LM.
        encoder: of the prompts.
        samples: the problems.
        group_size: responses to each problem.
        max_response_tokens: responses are cut off there.
        temperature: positive.
        seed: of the noise.
        step: part of that seed.
        batch_size: responses at a time; None: all at once.

    Raises:
        PolicyError: a prompt that the encoder refuses.
    """
    prompts: list[list[int]] = []
    seeds: list[int] = []
    for sample in samples:
        ids = encoder.ids(sample)
        for copy in range(group_size):
            prompts.append(ids)
            seeds.append(derive(seed, "sampling", step, sample.index, copy))

    # Noise belongs to the sequence, so the size of a part changes no response.
    size = batch_size or len(prompts)
    parts = []
    for start in range(0, len(prompts), size):
        part = generate(
            model,
            prompts[start : start + size],
            seeds[start : start + size],
            ending=encoder.ending,
            max_new_tokens=max_response_tokens,
            temperature=temperature,
        )
        parts.append(part)
    return join(parts, encoder.ending.pad_id)


def join(parts: Sequence[Generated], pad_id: int) -> Generated:
    """Join batches of different widths: prompts are padded on the left, responses on the right."""
    if len(parts) == 1:
        return parts[0]
    prompt_length = max(part.prompt_length for part in parts)
    response_length = max(part.response_mask.shape[1] for part in parts)

    input_ids: list[Tensor] = []
    attention_masks: list[Tensor] = []
    response_masks: list[Tensor] = []
    logprobs: list[Tensor] = []
    for part in parts:
        # Prompts end at one column, and responses start at the next, in every part.
        left = prompt_length - part.prompt_length
        right = response_length - part.response_mask.shape[1]
        input_ids.append(pad(part.input_ids, (left, right), value=pad_id))
        attention_masks.append(pad(part.attention_mask, (left, right), value=False))
        response_masks.append(pad(part.response_mask, (0, right), value=False))
        if part.logprobs is not None:
            logprobs.append(pad(part.logprobs, (0, right), value=0.0))
    return Generated(
        input_ids=torch.cat(input_ids),
        attention_mask=torch.cat(attention_masks),
        prompt_length=prompt_length,
        response_mask=torch.cat(response_masks),
        truncated=torch.cat([part.truncated for part in parts]),
        end_ids=parts[0].end_ids,
        logprobs=torch.cat(logprobs) if logprobs else None,
    )


def judge(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    generated: Generated,
) -> Responses:
    """Read the responses as text, find question and answer among their tokens, and let the task reward them.

    An answer that the task finds inside the thinking is none: the answer stands in the final part of a response
    (:func:`flowgraph.final_part`). What the prompt opens counts too; the samples that the task rewards say so
    (``Sample.opening``).

    Args:
        task: see :class:`rl.tasks.base.Task`.
        tokenizer: of the model.
        samples: one for each sequence; the responses to one problem are adjacent.
        generated: the responses of the policy.

    Raises:
        RewardError: the task raised, or returned a reward that is not a finite number or a span outside the text.

    Cost: one encoding and one decoding of each sequence.
    """
    prompt_length = generated.prompt_length
    question = torch.zeros(generated.input_ids.shape, dtype=torch.bool)
    answer = torch.zeros(generated.input_ids.shape, dtype=torch.bool)
    # The masks that only some tasks know, by the method that finds their characters.
    marks: dict[str, Callable[..., Any]] = {"oracle": task.oracle}
    if isinstance(task, DetourTask):
        marks["detours"] = task.detours
    marked: dict[str, Tensor] = {}
    completions: list[str] = []
    judged: list[Sample] = []
    end_ids: tuple[Any, ...] = (tokenizer.eos_token_id,)
    if generated.end_ids is not None:
        end_ids = generated.end_ids

    for row, sample in enumerate(samples):
        # Each token gets the characters that it stands for in the text of prompt and response.
        ids = generated.input_ids[row, prompt_length:][generated.response_mask[row]].tolist()
        # A policy may repeat what the template opened: that is for the reward to judge, and no mistake of the user's.
        encoded = encode(tokenizer, sample.prompt, ids, warn=False)
        completion = _completion(encoded, end_ids)
        completions.append(completion)
        opening = response_opening(encoded)
        judged.append(replace(sample, opening=opening) if opening else sample)

        # Question and answer: spans of the text, then masks over the columns behind the left padding.
        found = _call(task.find_answer, sample, completion, completion)
        span = None if found is None else _checked_span("find_answer", found, sample, completion)
        if span is not None and not final_part(completion, opening=opening).holds(*span):
            span = None
        question_tokens, answer_tokens = _regions(encoded, span)
        first = prompt_length - encoded.prompt_length
        columns = slice(first, first + encoded.num_tokens)
        question[row, columns] = question_tokens
        answer[row, columns] = answer_tokens

        # Decisive tokens and detours, where the task marks them; a response without this knowledge has none.
        for name, method in marks.items():
            value = _call(method, sample, completion, sample, completion)
            if value is None:
                continue
            mask = marked.setdefault(name, torch.zeros_like(generated.response_mask))
            spans = [_checked_span(name, item, sample, completion) for item in _checked_list(name, value, sample)]
            mask[row, : len(ids)] = _covered(encoded, spans)[encoded.prompt_length :]

    # Rewards come last, because a task may compare all completions.
    rewards = _rewards(task, judged, completions)
    has_parts = len(rewards.names) > 1
    return Responses(
        samples=tuple(samples),
        completions=tuple(completions),
        input_ids=generated.input_ids,
        attention_mask=generated.attention_mask,
        prompt_length=prompt_length,
        response_mask=generated.response_mask,
        truncated=generated.truncated,
        groups=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        rewards=rewards.totals,
        question=question,
        answer=answer,
        oracle=marked.get("oracle"),
        detours=marked.get("detours"),
        sampled_logprobs=generated.logprobs,
        reward_parts=rewards.parts if has_parts else None,
        reward_names=list(rewards.names) if has_parts else [],
    )


def _completion(encoded: EncodedText, end_ids: Sequence[Any]) -> str:
    """Return the text of a response without the end token behind it.

    Other special tokens stay: a tag such as ``</answer>`` may be one, and belongs to what the policy wrote.
    """
    end = len(encoded.text)
    for index in range(encoded.num_tokens - 1, encoded.prompt_length - 1, -1):
        if int(encoded.input_ids[index]) not in end_ids:
            break
        end = encoded.spans[index][0]
    return encoded.text[encoded.response_start : end]


def _rewards(task: Task, samples: Sequence[Sample], completions: Sequence[str]) -> RewardParts:
    """Let the task judge all responses in one call where it can, and one by one otherwise."""
    name = f"task {task.name!r}"
    if isinstance(task, BatchTask):
        return batch_rewards(task.batch_rewards, samples, completions, name=name)
    values = []
    for sample, completion in zip(samples, completions, strict=True):
        values.append(_call(task.reward, sample, completion, sample, completion, may_wait=True))
    totals = checked_values(values, samples, completions, name=name)
    return RewardParts(totals, totals[:, None], (name,))


def _regions(encoded: EncodedText, span: CharSpan | None) -> tuple[Bool[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Find question and answer as token masks; the answer is empty without a span with a visible character."""
    no_answer = torch.zeros(encoded.num_tokens, dtype=torch.bool)
    if span is None or span[0] == span[1]:
        return find_question(encoded), no_answer
    # Special tokens at the end count as text here: an answer may be one of them.
    if span[1] > len(encoded.response_text):
        return find_question(encoded), _covered(encoded, [span])
    # A span without a visible character is not an answer.
    try:
        regions = find_regions(encoded, answer=span)
    except NoAnswerError:
        return find_question(encoded), no_answer
    return regions.question, regions.answer


def _checked_span(method: str, span: Any, sample: Sample, text: str) -> CharSpan:
    """Check a span that a task returned: two integers in order, within the text."""
    is_pair = isinstance(span, list | tuple) and len(span) == 2
    # bool is a subclass of int, and is not a position.
    is_span = is_pair and all(isinstance(end, int) and not isinstance(end, bool) for end in span)
    if not is_span or not 0 <= span[0] <= span[1] <= len(text):
        raise RewardError(
            f"task: {method} must return spans (start, end) within the completion of {len(text)} characters, got "
            f"{span!r} for sample {sample.index} and {text[:80]!r}; count characters of the completion, end excluded"
        )
    return span[0], span[1]


def _checked_list(method: str, spans: Any, sample: Sample) -> list[Any]:
    """Check that a task returned a list or a tuple of spans."""
    if not isinstance(spans, list | tuple):
        raise RewardError(
            f"task: {method} must return a list of spans or None, got {type(spans).__name__} for sample "
            f"{sample.index}; return [(start, end), ...]"
        )
    return list(spans)


def _covered(encoded: EncodedText, spans: Sequence[CharSpan]) -> Bool[Tensor, " tokens"]:
    """Mark the tokens with a character in any of the spans of the response."""
    mask = torch.zeros(encoded.num_tokens, dtype=torch.bool)
    for index, (token_start, token_end) in enumerate(encoded.spans):
        # Spans of the task count from the first character of the response.
        start = token_start - encoded.response_start
        end = token_end - encoded.response_start
        mask[index] = any(start < span_end and span_start < end for span_start, span_end in spans)
    return mask


def _call(method: Callable[..., Any], sample: Sample, completion: str, *arguments: Any, may_wait: bool = False) -> Any:
    """Call a method of a task, which is user code and may raise anything; the error names the problem."""
    name = getattr(method, "__qualname__", method)
    try:
        value = method(*arguments)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"task: {name} must serve every completion, got "
            f"{describe_cause(error, f'for sample {sample.index} and {completion[:80]!r}')}; correct the task"
        ) from error
    if inspect.iscoroutine(value) and not may_wait:
        # An open coroutine makes Python warn later that it was never awaited.
        value.close()
        raise RewardError(
            f"task: {name} must return its result, got the coroutine {value.__qualname__!r} for sample "
            f"{sample.index}; define it without async, which only reward functions may have"
        )
    return value

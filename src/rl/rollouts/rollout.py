"""From problems to responses with their regions and rewards: the one place where text and token positions meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from flowgraph import EncodedText, FlowgraphError, NoAnswerError, encode, find_question, find_regions
from rl.errors import PolicyError, RewardError, TaskError
from rl.policy.sampling import Ending, Generated, generate, vocabulary_size
from rl.records import CharSpan, Responses, Sample
from rl.seeds import generator
from rl.tasks.base import Task
from rl.tasks.rewards import checked_rewards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHOWN_PROBLEMS = 5


class PromptEncoder:
    """Prompts as token ids, checked against the budget and the model's context.

    Args:
        tokenizer: of the model.
        model: its context length is read.
        max_prompt_tokens: longer prompts are refused.
        max_response_tokens: room that must be left for the response.

    Raises:
        PolicyError: the context has no room for a response.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        max_prompt_tokens: int,
        max_response_tokens: int,
    ) -> None:
        self.tokenizer, self.ending = tokenizer, Ending.of(model, tokenizer)
        self._vocabulary = vocabulary_size(model)
        config = model.config.get_text_config(decoder=True)
        context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        self._limit, self._rule = max_prompt_tokens, f"max_prompt_tokens={max_prompt_tokens}"
        if context is not None and context - max_response_tokens < max_prompt_tokens:
            self._limit = context - max_response_tokens
            self._rule = f"the model's context of {context} minus max_response_tokens={max_response_tokens}"
        if self._limit < 1:
            raise PolicyError(
                f"max_response_tokens: must leave room for a prompt, got {max_response_tokens} with a context of "
                f"{context} tokens; set it below {context}"
            )

    def ids(self, sample: Sample) -> list[int]:
        """Token ids of a problem's prompt.

        Raises:
            PolicyError: it is longer than allowed, or holds a token that the model does not know.
        """
        ids = self._encoded(sample)
        if len(ids) > self._limit:
            raise PolicyError(
                f"prompt: sample {sample.index} must have at most {self._limit} tokens ({self._rule}), got "
                f"{len(ids)}; raise the limit, or leave the problem out"
            )
        if max(ids) >= self._vocabulary:
            raise PolicyError(
                f"tokenizer: must be that of the model, got id {max(ids)} in sample {sample.index}, and the model has "
                f"{self._vocabulary} embeddings; load both from one folder, or call model.resize_token_embeddings"
            )
        return ids

    def check(self, samples: Iterable[Sample]) -> None:
        """Refuse problems that would stop a run when their turn comes.

        Raises:
            PolicyError: prompts that are too long: how many, and which.
        """
        lengths = {sample.index: len(self._encoded(sample)) for sample in samples}
        over = [index for index, length in lengths.items() if length > self._limit]
        if over:
            shown = ", ".join(map(str, over[:_SHOWN_PROBLEMS])) + (", ..." if len(over) > _SHOWN_PROBLEMS else "")
            raise PolicyError(
                f"prompt: every problem must have at most {self._limit} tokens ({self._rule}), got {len(over)} of "
                f"{len(lengths)} that are longer, up to {max(lengths.values())} (numbers {shown}); raise the limit, or "
                "leave them out"
            )

    def _encoded(self, sample: Sample) -> list[int]:
        encoded = encode(self.tokenizer, sample.prompt, [self.ending.end_ids[0]])
        return encoded.input_ids[: encoded.prompt_length].tolist()


def draw_samples(task: Task, split: str, indices: Iterable[int]) -> list[Sample]:
    """Problems of a task by number.

    Raises:
        TaskError: the task raised, or returned something that is not the problem asked for.
    """
    samples = []
    for index in indices:
        try:
            sample = task.sample(split, index)
        except FlowgraphError:
            raise
        except Exception as error:  # a task is someone's code: name the problem on which it fails
            raise TaskError(
                f"task: must have a problem for every number, got {type(error).__name__}: {error} for number {index} "
                f"of {split!r}; mend the task"
            ) from error
        if not isinstance(sample, Sample) or sample.index != index:  # responses are grouped by this number
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
    """``group_size`` responses to each problem, those of one problem side by side.

    The noise of response k to problem i of a step is a function of (seed, step, i, k) alone.
    """
    prompts = [ids for sample in samples for ids in [encoder.ids(sample)] * group_size]
    noise = [generator(seed, "sampling", step, sample.index, copy) for sample in samples for copy in range(group_size)]
    size = batch_size or len(prompts)
    parts = [
        generate(
            model, prompts[start : start + size], noise[start : start + size], ending=encoder.ending,
            max_new_tokens=max_response_tokens, temperature=temperature,
        )
        for start in range(0, len(prompts), size)
    ]  # fmt: skip
    return join(parts, encoder.ending.pad_id)


def join(parts: Sequence[Generated], pad_id: int) -> Generated:
    """Batches of different widths as one."""
    if len(parts) == 1:
        return parts[0]
    prompt = max(part.prompt_length for part in parts)
    response = max(part.response_mask.shape[1] for part in parts)

    def widen(part: Generated, tensor: Tensor, fill: Any) -> Tensor:
        sides = (prompt - part.prompt_length, response - part.response_mask.shape[1])
        return torch.nn.functional.pad(tensor, sides, value=fill)

    return Generated(
        torch.cat([widen(part, part.input_ids, pad_id) for part in parts]),
        torch.cat([widen(part, part.attention_mask, False) for part in parts]),
        prompt,
        torch.cat([
            torch.nn.functional.pad(part.response_mask, (0, response - part.response_mask.shape[1]), value=False)
            for part in parts
        ]),
        torch.cat([part.truncated for part in parts]),
    )  # fmt: skip


def judge(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    generated: Generated,
) -> Responses:
    """Read the responses as text, find question and answer among their tokens, and ask the task for its verdict.

    Args:
        task: see :class:`rl.tasks.base.Task`.
        tokenizer: of the model.
        samples: one for each sequence; the responses to one problem side by side.
        generated: what the policy wrote.

    Raises:
        RewardError: the task raised, or returned something that is no finite number or no span of the text.
    """
    P, shape = generated.prompt_length, generated.input_ids.shape
    question, answer = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    oracle = torch.zeros_like(generated.response_mask)
    knows = False
    completions = []
    for row, sample in enumerate(samples):
        ids = generated.input_ids[row, P:][generated.response_mask[row]].tolist()
        encoded = encode(tokenizer, sample.prompt, ids)
        start = P - encoded.prompt_length
        text = encoded.response_text
        completions.append(text)
        found = _call(task.find_answer, sample, text, text)
        asked, answered = _regions(encoded, None if found is None else _span("find_answer", found, sample, text))
        question[row, start : start + len(asked)] = asked
        answer[row, start : start + len(answered)] = answered
        decisive = _call(task.oracle, sample, text, sample, text)
        if decisive is not None:
            knows = True
            spans = [_span("oracle", span, sample, text) for span in _listed(decisive, sample)]
            oracle[row, : len(ids)] = _covered(encoded, spans)[encoded.prompt_length :]
    rewards = checked_rewards(
        lambda chosen, texts: [task.reward(sample, text) for sample, text in zip(chosen, texts, strict=True)],
        samples, completions, name=f"task {task.name!r}",
    )  # fmt: skip
    groups = torch.tensor([sample.index for sample in samples], dtype=torch.int64)
    return Responses(
        samples=tuple(samples),
        completions=tuple(completions),
        input_ids=generated.input_ids,
        attention_mask=generated.attention_mask,
        prompt_length=P,
        response_mask=generated.response_mask,
        truncated=generated.truncated,
        groups=groups,
        rewards=rewards,
        question=question,
        answer=answer,
        oracle=oracle if knows else None,
    )


def _regions(encoded: EncodedText, span: CharSpan | None) -> tuple[Bool[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Question and answer as token masks; an answer without a visible character is none."""
    nothing = torch.zeros(encoded.num_tokens, dtype=torch.bool)
    if span is None or span[0] == span[1]:
        return find_question(encoded), nothing
    try:
        regions = find_regions(encoded, answer=span)
    except NoAnswerError:
        return find_question(encoded), nothing
    return regions.question, regions.answer


def _span(method: str, span: Any, sample: Sample, text: str) -> CharSpan:
    """What a task says of a place in the text, believed only where the text has such a place."""
    pair: tuple[Any, ...] = tuple(span) if isinstance(span, list | tuple) else ()
    whole = len(pair) == 2 and all(isinstance(end, int) and not isinstance(end, bool) for end in pair)
    if not whole or not 0 <= pair[0] <= pair[1] <= len(text):
        raise RewardError(
            f"task: {method} must return spans (start, end) within the completion of {len(text)} characters, got "
            f"{span!r} for sample {sample.index} and {text[:80]!r}; count characters of the completion, end excluded"
        )
    return pair[0], pair[1]


def _listed(spans: Any, sample: Sample) -> list[Any]:
    if not isinstance(spans, list | tuple):
        raise RewardError(
            f"task: oracle must return a list of spans or None, got {type(spans).__name__} for sample {sample.index}; "
            "return [(start, end), ...]"
        )
    return list(spans)


def _covered(encoded: EncodedText, spans: Sequence[CharSpan]) -> Bool[Tensor, " tokens"]:
    """Tokens with a character in any of the spans of the response."""
    mask = torch.zeros(encoded.num_tokens, dtype=torch.bool)
    for index, (start, end) in enumerate(encoded.spans):
        low, high = start - encoded.response_start, end - encoded.response_start
        mask[index] = any(low < stop and begin < high for begin, stop in spans)
    return mask


def _call(method: Callable[..., Any], sample: Sample, completion: str, *arguments: Any) -> Any:
    """A task is someone's code: name the problem on which it fails."""
    try:
        return method(*arguments)
    except Exception as error:
        raise RewardError(
            f"task: {getattr(method, '__qualname__', method)} must serve every completion, got "
            f"{type(error).__name__}: {error} for sample {sample.index} and {completion[:80]!r}; mend the task"
        ) from error

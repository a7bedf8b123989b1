"""``Subject``: one item under one model, with everything that tasks and methods read of it, computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from flowgraph.evaluation.records import EvaluationItem
from flowgraph.interventions.knockout import Intervention, KnockoutResult, knockouts
from flowgraph.tracing.flow_trace import FlowTrace
from flowgraph.tracing.relevance_trace import RelevanceTrace
from flowgraph.tracing.trace import trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Computed = TypeVar("Computed")


class Subject:
    """One item under one model: its tokens and regions, and traces that methods share.

    Attributes:
        model: the causal LM.
        tokenizer: its tokenizer.
        item: the item.
        base: the trace with default settings (plain attention); it holds tokens, text, spans and regions.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, item: EvaluationItem) -> None:
        """Tokenize the item, generate its response where it has none, and find its regions.

        A tokenizer without a chat template reads the contents of chat messages as plain text, each followed by a line
        break.

        Raises:
            RegionError, NoAnswerError: the regions cannot be found.
            CaptureError, MemoryLimitError: the model cannot be traced, or the trace would not fit.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.item = item
        self.base: FlowTrace = trace(
            model,
            tokenizer,
            _readable_prompt(tokenizer, item.prompt),  # type: ignore[arg-type]
            item.response,
            question=item.question,
            answer=item.answer,
            max_edges="all",
        )
        self._traces: dict[str, FlowTrace | RelevanceTrace] = {}
        self._computed: dict[str, Any] = {}

    @property
    def num_tokens(self) -> int:
        """Number of tokens N."""
        return self.base.num_tokens

    @property
    def token_ids(self) -> Int64[Tensor, " tokens"]:
        """Ids of prompt and response."""
        return self.base.token_ids

    @property
    def question(self) -> Bool[Tensor, " tokens"]:
        """Mask of the question's tokens."""
        return self.base.question

    @property
    def reasoning(self) -> Bool[Tensor, " tokens"]:
        """Mask of the generated tokens before the answer."""
        return self.base.reasoning

    @property
    def answer(self) -> Bool[Tensor, " tokens"]:
        """Mask of the answer's tokens."""
        return self.base.answer

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the response."""
        generated = self.base.generated.nonzero().flatten()
        return int(generated[0]) if len(generated) else self.num_tokens

    def trace(self, capacity: str = "attention", **options: Any) -> FlowTrace | RelevanceTrace:
        """Trace the same tokens with another capacity or composition; each setting is computed once.

        Args:
            capacity: see :func:`flowgraph.trace`.
            **options: further arguments of :func:`flowgraph.trace`.

        Cost: the first call of a setting: one forward pass, and a backward pass where the capacity needs it.
        """
        # The regions are those of the base trace, so that every setting explains the same question and answer.
        key = repr((capacity, sorted(options.items())))
        if key not in self._traces:
            self._traces[key] = trace(
                self.model,
                self.tokenizer,
                input_ids=self.token_ids[None],
                prompt_length=self.prompt_length,
                question=self.question,
                answer=self.answer,
                reasoning=self.reasoning,
                capacity=capacity,
                max_edges="all",
                **options,
            )
        return self._traces[key]

    def once(self, key: str, compute: Callable[[], Computed]) -> Computed:
        """Return what was computed under this key before, else compute it: methods share passes of the model.

        Args:
            key: names the computation and all of its settings.
            compute: called without arguments where the key is new.
        """
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def knockouts(self, interventions: Sequence[Intervention], *, batch_size: int = 8) -> list[KnockoutResult]:
        """Mask tokens or edges in the model and measure the answer; see :func:`flowgraph.knockouts`."""
        return knockouts(self.model, self.base, interventions, batch_size=batch_size)

    def positions(self, mask: Bool[Tensor, " tokens"]) -> list[int]:
        """List the positions where a mask is True."""
        return torch.nonzero(mask).flatten().tolist()


def _readable_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]) -> Any:
    """Return a prompt as it is, or as plain text where it is a chat and the tokenizer has no template for chats."""
    if isinstance(prompt, str) or getattr(tokenizer, "chat_template", None):
        return prompt
    contents = [message.get("content") for message in prompt]
    if not all(isinstance(content, str) for content in contents):
        # Contents in parts need a template: the trace raises the error that explains it.
        return prompt
    lines = [f"{content}\n" for content in contents]
    return "".join(lines)

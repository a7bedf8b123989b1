"""``CorpusOptions``: the choices of a corpus run, checked once before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from flowgraph.errors import InvalidInputError
from flowgraph.text.chat import checked_template_options
from flowgraph.text.selectors import Regex, Selector
from flowgraph.tracing.generation import check_max_new_tokens, is_integer
from flowgraph.tracing.trace_options import TraceOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class CorpusOptions:
    """The choices of a corpus run.

    Attributes:
        trace: the choices of every trace.
        question: where flow enters, for lines that do not name it; None: found.
        answer: where flow leaves, for lines that do not name it; None: found.
        plain: text prompts are not made into chat messages.
        system: system message in front of text prompts.
        chat_template_kwargs: arguments of the chat template; a line may override them.
        keep: share of the flow whose routes make the backbone, in (0, 1].
        batch_tokens: most tokens, padding included, of one forward pass. It changes rounding only. Lines of a relevance
            run alone.
        html: whether a page is written for each trace.
    """

    trace: TraceOptions
    question: str | Selector | None
    answer: str | Selector | None
    plain: bool
    system: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    keep: float
    batch_tokens: int
    html: bool

    def __post_init__(self) -> None:
        """Refuse a batch size that is not a positive integer."""
        if not is_integer(self.batch_tokens) or self.batch_tokens < 1:
            raise InvalidInputError(
                f"batch_tokens: must be a positive number, got {self.batch_tokens!r}; 512 is the default"
            )

    def check(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse every choice that would fail on each line.

        Raises:
            InvalidInputError: a choice outside its range.
            CaptureError: the architecture cannot be captured correctly.
        """
        self.trace.check(model)
        for pattern in (self.question, self.answer):
            if isinstance(pattern, str):
                Regex(pattern)
        check_max_new_tokens(self.trace.max_new_tokens)
        if not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise InvalidInputError(f"keep: must lie in (0, 1], got {self.keep!r}; 0.9 keeps the routes of 90 %")
        if self.system and (self.plain or not getattr(tokenizer, "chat_template", None)):
            raise InvalidInputError(
                f"system: needs a chat template, got {self.system!r:.80} without; write it into the prompts"
            )
        checked_template_options(tokenizer, self.chat_template_kwargs)
        if self.chat_template_kwargs and not getattr(tokenizer, "chat_template", None):
            raise InvalidInputError(
                f"chat_template_kwargs: need a chat template, got {self.chat_template_kwargs!r:.80} without; "
                "leave them out"
            )

    def settings(self) -> dict[str, str]:
        """List the options that decide a result by name, as text, for the manifest of a run."""
        trace = self.trace
        deciding = {
            "capacity": trace.capacity,
            "capacity_options": dict(sorted((trace.capacity_options or {}).items())),
            "layers": trace.chosen_layers,
            "heads": trace.heads or "mean",
            "edge_weight": trace.edge_weight,
            "preset": trace.preset,
            "question": self.question,
            "answer": self.answer,
            "plain": self.plain,
            "system": self.system,
            "chat_template_kwargs": checked_template_options(None, self.chat_template_kwargs),
            "source": trace.source,
            "absorption": trace.absorption,
            "damping": trace.damping,
            "max_edges": trace.max_edges,
            "backend": trace.backend,
            "max_new_tokens": trace.max_new_tokens,
            "keep": self.keep,
        }
        # Named only where one is chosen, so that earlier runs without one can go on.
        if trace.chosen_composition is not None:
            chosen, complete = trace.chosen_composition
            listed = ", ".join(f"{name}={value}" for name, value in complete.items())
            deciding["composition"] = f"{chosen.name}({listed})"
        settings = {name: str(value) for name, value in deciding.items()}
        # The rules that apply, after the overrides of the preset.
        return settings | asdict(trace.rules)

"""How much a command prints of a trace and its certificate: a line, a screen, or everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowgraph.commands.common import one_view

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from flowgraph.certificate.certify import Certificate
    from flowgraph.steps.step_relevance import StepRelevance
    from flowgraph.tracing.baselines import Baselines
    from flowgraph.tracing.flow_trace import FlowTrace
    from flowgraph.tracing.relevance_trace import RelevanceTrace


@dataclass(frozen=True)
class View:
    """The view that the options of a command choose; without an option, it fits a screen.

    Attributes:
        full: print everything.
        quiet: print the answer alone, and failed checks.
        all_tokens: print everything, with every token in the table.
        relevance: print the relevance step by step also in the view that fits a screen.
        keep: share of the flow whose routes make the backbone.

    Raises:
        BadParameter: quiet with full or all_tokens.
    """

    full: bool = False
    quiet: bool = False
    all_tokens: bool = False
    relevance: bool = False
    keep: float = 0.9

    def __post_init__(self) -> None:
        one_view(full=self.full or self.all_tokens, quiet=self.quiet)

    @property
    def is_full(self) -> bool:
        """Whether everything is printed."""
        return self.full or self.all_tokens

    def of_trace(self, trace: FlowTrace, *, with_tokens: bool = True) -> RenderableType:
        """Render a trace; the view that fits a screen tabulates its strongest tokens on request."""
        from rich.text import Text

        from flowgraph.commands.terminal import NUM_TOKEN_ROWS, brief_trace, render_trace, visible

        if self.quiet:
            return Text(visible(trace.text_of(trace.answer).strip()), no_wrap=True, overflow="ignore")
        if not self.is_full:
            return brief_trace(trace, with_tokens=with_tokens)
        return render_trace(trace, keep=self.keep, rows=None if self.all_tokens else NUM_TOKEN_ROWS)

    def of_relevance(self, relevance: StepRelevance) -> list[RenderableType]:
        """Render relevance between steps, set apart from what stands before it."""
        from flowgraph.commands.terminal import brief_relevance, relevance_tree

        if self.quiet:
            return []
        if self.is_full or self.relevance:
            return ["", relevance_tree(relevance)]
        return ["", brief_relevance(relevance)]

    def of_baselines(
        self, trace: FlowTrace | RelevanceTrace, baselines: Baselines | None = None
    ) -> list[RenderableType]:
        """Render how far rankings without a flow agree with that of a trace; nothing where nothing is ranked."""
        from flowgraph.commands.terminal import baselines_line, baselines_table
        from flowgraph.tracing.baselines import can_rank

        if self.quiet or not can_rank(trace):
            return []
        found = trace.baselines() if baselines is None else baselines
        return ["", baselines_table(found)] if self.is_full else [baselines_line(found)]

    def of_certificate(self, certificate: Certificate) -> list[RenderableType]:
        """Render a certificate, set apart from what stands before it; a quiet view has failures only."""
        from flowgraph.commands.terminal import brief_certificate, certificate_table

        if self.quiet and certificate.ok:
            return []
        if not self.is_full:
            return [brief_certificate(certificate)]
        return ["", certificate_table(certificate)]

    def print_end(self, terminal: Console, outputs: Sequence[Path]) -> None:
        """Print the files that were written, and which option shows more."""
        if self.quiet:
            return
        # Names of files are not folded, so that they can be copied.
        if outputs:
            names = ", ".join(path.name for path in outputs[1:])
            line = f"wrote {outputs[0]} (open it in a browser), {names}"
            terminal.print(line, highlight=False, markup=False, soft_wrap=True)
        if not self.is_full:
            terminal.print("--full prints the whole text, more tokens and routes, and every check", style="dim")

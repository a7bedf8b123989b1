"""A trace and a certificate as terminal output: the text as a heat map, a token table, the routes, the checks.

Each has a brief view, which fits a screen, and a full one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flowgraph.certificate.certify import Certificate
from flowgraph.certificate.checks import Check
from flowgraph.display import signs
from flowgraph.display.palette import FIRST_STEP_WITH_BLACK_INK, FLOW_RAMP_ON_DARK
from flowgraph.graph.flow_graph import REGIONS
from flowgraph.steps.step_relevance import StepRelevance
from flowgraph.text.quoting import shortened
from flowgraph.text.spans import printed_pieces
from flowgraph.tracing.baselines import Baselines
from flowgraph.tracing.flow_trace import FlowTrace
from flowgraph.tracing.payload import token_regions
from flowgraph.tracing.provenance import describe_response

NUM_TOKEN_ROWS = 24
"""Rows of the token table in the full view, unless all tokens are listed."""
_MAX_ANSWER = 200
"""Characters of the answer."""
_MAX_NAME = 24
"""Characters of a token in a list."""
_ROUTE_ENDS = 5
"""Tokens shown at each end of a long route."""
_MAX_SELECTION = 160
"""Characters of the answer and the rule that found it in the brief view."""
_NUM_BRIEF_TOKENS = 6
_NUM_BRIEF_ROUTES = 3
_NUM_BRIEF_LINES = 5
"""Lines of text in the brief view."""
_NUM_BRIEF_PARTS = 8
"""Lines of the tree of relevance in the brief view."""
_BRIEF_DEPTH = 3
_BRIEF_SHARE = 0.08
"""Smallest contribution in the brief view's tree of relevance."""
_BRIEF_WIDTH = 76
"""Characters of a line of text in the brief view."""

_DIM_BELOW = 0.05
_REGION_LETTERS = {"question": "Q", "reasoning": "R", "answer": "A", None: ""}
_BAR_WIDTH = 16

_SMALLEST_END = 0.005
_NO_FLOW = "No flow: no question token reaches the answer through this graph."

_FOUND_AS = {
    "boxed": "in the last box",
    "hash": "after ####",
    "tag": "in the answer tag",
    "json": "as the answer of a JSON object",
    "phrase": "as a stated answer",
    "choice": "as the option chosen",
    "code": "as the last block of code",
    "last sentence": "as the last sentence",
    "whole response": "as the whole response",
}
"""How the automatic search found an answer (``answer_by``), in words."""
_NOT_STATED = ("code", "last sentence", "whole response")


def visible(token: str) -> str:
    """Show signs for invisible characters and for blank tokens, so that no text can control a terminal."""
    if not token.strip(" "):
        return "␣" * len(token)
    return signs.visible(token)


def bar(share: float, width: int) -> str:
    """Draw a bar of ``share * width`` blocks; a share too small for one block is a thin line."""
    blocks = round(width * share)
    if blocks:
        return "█" * blocks
    return "▏" if share > 0 else ""


def render_trace(
    trace: FlowTrace, *, keep: float = 0.9, rows: int | None = NUM_TOKEN_ROWS, num_routes: int = 6
) -> RenderableType:
    """Render a trace: its text, the strongest tokens in text order, backbone and routes.

    Args:
        trace: the trace.
        keep: share of the flow whose routes make the backbone.
        rows: rows of the token table; None lists every token.
        num_routes: number of routes.
    """
    parts: list[RenderableType] = [
        Text(repr(trace).split("\n")[0]),
        _selection(trace),
        *_response(trace),
        Text(),
        heat_text(trace),
        Text(),
        token_table(trace, rows),
        Text(),
    ]
    if trace.feasible:
        parts.append(_backbone(trace, keep))
        parts.append(_routes(trace, num_routes))
        parts.append(_specificity(trace))
    else:
        parts.append(Text(_NO_FLOW, style="bold yellow"))
    return Group(*parts)


def brief_trace(trace: FlowTrace, *, with_tokens: bool = True) -> RenderableType:
    """Render a trace in some twenty lines: its answer, the end of its text, the strongest tokens and routes.

    Args:
        trace: the trace.
        with_tokens: tabulate the strongest tokens.
    """
    model = signs.visible(str(trace.provenance.get("model") or "a model"))
    sizes = ", ".join(f"{name} {int(trace.graph[f'{name}_mask'].sum()):,}" for name in REGIONS)
    selection = _selection(trace)
    selection.truncate(_MAX_SELECTION, overflow="ellipsis")
    shown = _end_of_text(trace)
    left_out = Text(f"[… {shown.start:,} tokens before]" if shown.start else "", style="dim")
    parts: list[RenderableType] = [
        Text(f"{model}: {trace.num_tokens:,} tokens ({sizes})"),
        selection,
        left_out,
        heat_text(trace, shown),
        Text(),
    ]
    if not trace.feasible:
        parts.append(Text(_NO_FLOW, style="bold yellow"))
        return Group(*parts)
    if with_tokens:
        parts.append(
            Text("strongest tokens by throughput, the share of the flow that passes through a token", style="italic")
        )
        parts.append(_brief_tokens(trace))
    parts.append(Text("widest routes of the flow", style="italic"))
    parts.append(_routes(trace, _NUM_BRIEF_ROUTES, is_brief=True))
    parts.append(_specificity(trace, is_brief=True))
    return Group(*parts)


def _specificity(trace: FlowTrace, *, is_brief: bool = False) -> Text:
    """Say how much the flow is about the question, so that a ranking is not read as more than it is."""
    found = trace.specificity()
    if is_brief:
        figure = "" if found.total_variation is None else f" {found.total_variation:.3f}"
        return Text(f"question specificity{figure}: {found.description}", no_wrap=True, overflow="ellipsis")
    entry = ", ".join(f"{name} {share:.0%}" for name, share in found.entry.items() if share >= _SMALLEST_END)
    line = Text("the flow is ")
    if found.total_variation is None:
        line.append("not comparable: one place of entry alone reaches the answer")
    else:
        line.append(found.description)
        line.append(f" (total variation {found.total_variation:.2g} against {found.compared_with})", style="dim")
    line.append(f"; its reach enters the prompt at: {entry}", style="dim")
    return line


def baselines_line(found: Baselines) -> Text:
    """Say in a line or two how far rankings without a flow agree with that of a trace; those without a model fit one.

    Baselines that were not computed are left to :func:`baselines_table`.
    """
    line = Text(f"Spearman/top {found.num_top} beside: ")
    parts = []
    for each in found.baselines:
        if each.scores is None:
            continue
        if each.spearman is None or each.overlap is None:
            parts.append(f"{each.name} -")
            continue
        correlation = "0" if each.spearman == 0 else f"{each.spearman:.2f}".replace("0.", ".", 1)
        parts.append(f"{each.name} {correlation}/{each.overlap:.0%}")
    line.append(", ".join(parts), style="dim")
    return line


def baselines_table(found: Baselines) -> RenderableType:
    """Tabulate the baselines of a ranking, with what each is."""
    place = "before the answer" if found.region == "all" else f"of the {found.region}"
    table = Table(
        title=f"how this ranking compares: {found.score}, {found.num_tokens} tokens {place}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("ranking without a flow")
    table.add_column("Spearman", justify="right")
    table.add_column(f"common top {found.num_top}", justify="right")
    table.add_column("what it is", style="dim")
    for each in found.baselines:
        correlation = "-" if each.spearman is None else f"{each.spearman:+.2f}"
        overlap = "-" if each.overlap is None else f"{each.overlap:.0%}"
        note = f"{each.description} ({signs.visible(each.reason)})" if each.reason else each.description
        table.add_row(each.name, correlation, overlap, note)
    return table


def _response(trace: FlowTrace) -> list[Text]:
    """Say how the response was made; loudly where it was cut off."""
    made = describe_response(trace.provenance)
    if made is None:
        return []
    return [Text(f"response: {made}", style="bold yellow" if trace.provenance.get("truncated") else "")]


def _end_of_text(trace: FlowTrace) -> range:
    """Choose the tokens of the last few lines of text up to the answer, from the start of the response where it fits.

    The answer stands at the end of most responses, and the reasoning that leads to it stands before it.
    """
    answer = trace.answer.nonzero().flatten().tolist()
    generated = trace.generated.nonzero().flatten().tolist()
    stop = (answer[-1] if answer else trace.num_tokens - 1) + 1
    first = generated[0] if generated else 0

    # Walk back from the answer until the lines are full; a line break inside a token ends a line.
    num_lines = 0
    num_columns = 0
    for token in range(stop - 1, first - 1, -1):
        for place, part in enumerate(reversed(signs.visible(trace.tokens[token]).split("⏎"))):
            if place > 0:
                num_lines += math.ceil(num_columns / _BRIEF_WIDTH)
                num_columns = 1
            num_columns += cell_len(part)
        if num_lines + math.ceil(num_columns / _BRIEF_WIDTH) > _NUM_BRIEF_LINES:
            return range(min(token + 1, stop - 1), stop)
    return range(first, stop)


def _brief_tokens(trace: FlowTrace) -> Table:
    """Tabulate the few strongest tokens outside the answer, whose own tokens carry everything."""
    tokens = sorted(_strongest(trace, _NUM_BRIEF_TOKENS, with_answer=False))
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("#", justify="right", style="dim")
    table.add_column("token")
    table.add_column("throughput", justify="right")
    table.add_column("bar")
    table.add_column("region", style="dim")
    shares = trace.throughput.tolist()
    regions = token_regions(trace.graph)
    largest = max([shares[token] for token in tokens], default=1.0)
    for token in tokens:
        name = Text(_name(trace.tokens[token]))
        length = bar(shares[token] / max(largest, 1e-12), _BAR_WIDTH)
        table.add_row(str(token), name, f"{shares[token]:.1%}", length, regions[token] or "context")
    return table


def heat_text(trace: FlowTrace, part: range | None = None) -> Text:
    """Render the text, each token on a background that grows brighter with the square root of its throughput.

    Args:
        trace: the trace.
        part: the tokens to show; None shows all.
    """
    text = Text(no_wrap=False)
    # Tokens that share a character print it once, as strong as the strongest of them.
    pieces = printed_pieces(trace.tokens, trace.spans.tolist(), trace.text)
    throughput = trace.throughput.tolist()
    printing = 0
    for index, piece in enumerate(pieces):
        if piece:
            printing = index
        throughput[printing] = max(throughput[printing], throughput[index])

    regions = token_regions(trace.graph)
    for index in part if part is not None else range(trace.num_tokens):
        token = pieces[index]
        if not token:
            continue
        region = regions[index]
        # The square root spreads small shares, which most tokens have.
        strength = throughput[index] ** 0.5
        style = _heat_style(strength)
        if region == "question":
            style = f"underline {style}"
        elif region == "answer":
            style = f"bold reverse {style}"
        is_plain_blank = token.isspace() and "\n" not in token
        shown = token if is_plain_blank else visible(token)
        # A line break of the text is shown, and also breaks the line.
        text.append(shown.replace("⏎", "⏎\n"), style=style)
    return text


def _heat_style(strength: float) -> str:
    """Choose the colours of a token by its strength in [0, 1]."""
    if strength < _DIM_BELOW:
        return "dim"
    step = min(int(strength * len(FLOW_RAMP_ON_DARK)), len(FLOW_RAMP_ON_DARK) - 1)
    ink = "black" if step >= FIRST_STEP_WITH_BLACK_INK else "white"
    return f"{ink} on {FLOW_RAMP_ON_DARK[step]}"


def token_table(trace: FlowTrace, rows: int | None = NUM_TOKEN_ROWS) -> RenderableType:
    """Tabulate the strongest tokens in text order, a third of the rows for the question.

    Args:
        trace: the trace.
        rows: most rows; None lists every token.
    """
    if rows is None:
        tokens = list(range(trace.num_tokens))
        title = "all tokens"
    else:
        tokens = sorted(_strongest(trace, rows))
        title = f"{len(tokens)} of {trace.num_tokens} tokens, those with most throughput"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, caption_justify="left")
    table.add_column("#", justify="right", style="dim")
    table.add_column("")
    table.add_column("token")
    table.add_column("throughput", justify="right")
    table.add_column("")
    table.add_column("h", justify="right", style="dim")

    # Bars are relative to the strongest token outside the answer, whose own tokens would dwarf all others.
    throughput = trace.throughput
    passing = throughput[~trace.answer]
    largest = float(passing.max()) if passing.numel() else 0.0
    scale = max(largest, 1e-12)
    regions = token_regions(trace.graph)
    for token in tokens:
        value = float(throughput[token])
        region = regions[token]
        table.add_row(
            str(token),
            _REGION_LETTERS[region],
            Text(visible(trace.tokens[token])),
            f"{value:.3f}",
            "" if region == "answer" else bar(value / scale, _BAR_WIDTH),
            f"{float(trace.potential[token]):.3g}",
        )
    # A caption of the table would be as narrow as the table.
    caption = Text(
        "Q question, R reasoning, A answer (without a bar); throughput: share of the flow that passes through the "
        "token; h: its total influence on the answer, over all paths",
        style="dim italic",
    )
    return Group(table, caption)


def _strongest(trace: FlowTrace, rows: int, *, with_answer: bool = True) -> list[int]:
    """Choose the tokens of the table.

    Every question token carries its own share of the source, so without a limit the question would fill the table.
    """
    order: list[int] = trace.throughput.argsort(descending=True, stable=True).tolist()
    is_question = trace.question.tolist()
    if not with_answer:
        is_answer = trace.answer.tolist()
        order = [token for token in order if not is_answer[token]]
    question = [token for token in order if is_question[token]][: rows // 3]
    others = [token for token in order if not is_question[token]][: rows - len(question)]
    return question + others


def brief_certificate(certificate: Certificate) -> RenderableType:
    """Render a certificate in one line, with the checks that do not hold where there are any."""
    score = "" if certificate.score is None else f"; tokens are ranked by {signs.visible(certificate.score)}"
    lines: list[RenderableType] = [Text(f"certificate: {certificate.result}{score}")]
    if not certificate.ok:
        lines.append(_checks(certificate.failed))
    return Group(*lines, *_notes(certificate))


def certificate_table(certificate: Certificate) -> RenderableType:
    """Render a certificate with one row a check: passed or failed, residual and bound, the statement in words."""
    head = Text(f"Certificate: {certificate.result}", style="bold")
    score = "" if certificate.score is None else f"; tokens are ranked by {signs.visible(certificate.score)}"
    figures = Text(f"  {certificate.figures}{score}")
    meaning = Text("  alpha: so many times this flow fits through the attention; V: the exact max flow", style="dim")
    return Group(head, figures, meaning, _checks(certificate.checks), *_notes(certificate))


def _notes(certificate: Certificate) -> list[Text]:
    return [Text(f"note: {note}") for note in certificate.notes]


def _checks(checks: Sequence[Check]) -> Table:
    """Tabulate checks with residual and bound."""
    table = Table(box=None, pad_edge=False, show_header=True)
    table.add_column("", overflow="fold")
    table.add_column("check", overflow="fold")
    table.add_column("residual", justify="right", overflow="fold")
    table.add_column("bound", justify="right", overflow="fold")
    table.add_column("statement", overflow="fold")
    for check in checks:
        mark = Text("✓", style="green") if check.ok else Text("✗", style="bold red")
        statement = Text(check.statement)
        if check.detail:
            statement.append(f" ({check.detail})", style="dim")
        table.add_row(mark, check.name, f"{check.residual:.1g}", f"{check.bound:.1g}", statement)
    return table


def brief_relevance(relevance: StepRelevance) -> RenderableType:
    """Render the largest contributions of the tree in a few lines."""
    return _tree(relevance, relevance.chain(depth=_BRIEF_DEPTH, smallest=_BRIEF_SHARE)[:_NUM_BRIEF_PARTS])


def relevance_tree(relevance: StepRelevance) -> RenderableType:
    """Render what the answer took from which step, and that step from which; negative shares argue against it."""
    return _tree(relevance, relevance.chain())


def _tree(relevance: StepRelevance, rows: Sequence[tuple[int, int, float]]) -> RenderableType:
    title = Text("where the answer came from: its relevance, by steps", style="bold")
    title.append(f"  (of {relevance.total:.3g} logits; conserved to {relevance.residual:.0e})", style="dim")
    lines = [title]
    for level, step, share in rows:
        line = Text("    " * level, no_wrap=True, overflow="ellipsis")
        line.append(f"{share:+5.0%} ", style="red" if share < 0 else "bold")
        line.append(signs.visible(" ".join(relevance.steps[step].text.split())))
        lines.append(line)
    ends = Text("ends in: ", style="dim")
    ends.append(", ".join(f"{name} {share:.0%}" for name, share in _where_it_ends(relevance)), style="dim")
    return Group(*lines, ends)


def _where_it_ends(relevance: StepRelevance) -> list[tuple[str, float]]:
    """List the shares of the demand that stay at embeddings of each region, and in biases."""
    shares = {"question": 0.0, "reasoning": 0.0, "answer": 0.0, "template and system": 0.0}
    for step, absorbed in zip(relevance.steps, relevance.absorbed.tolist(), strict=True):
        shares[step.region or "template and system"] += absorbed
    shares["biases"] = float(relevance.bias.sum())
    return [(name, share) for name, share in shares.items() if abs(share) >= _SMALLEST_END]


def _selection(trace: FlowTrace) -> Text:
    """Show the answer and the rule that found it, the first thing to check when a trace looks wrong."""
    answer = shortened(trace.text_of(trace.answer).strip(), _MAX_ANSWER)
    rule = str(trace.provenance.get("answer_selector", ""))
    found_by = str(trace.provenance.get("answer_by", ""))
    kind, _, unfinished = found_by.partition(", ")
    line = Text(f"answer: {answer!r}")
    if kind in _FOUND_AS:
        line.append(f" {_FOUND_AS[kind]}", style="dim")
    elif rule:
        line.append(f" by {rule}", style="dim")
    # The end of a response is the last resort of the search, and often not the answer.
    if kind in _NOT_STATED:
        reason = "the response was cut off before it stated an answer" if unfinished else "no answer is stated"
        line.append(f"\n{reason}, so the {kind} was taken; name it with --answer or answer=", "yellow")
    return line


def _backbone(trace: FlowTrace, keep: float) -> Text:
    """Describe the backbone in one line."""
    backbone = trace.backbone(keep)
    return Text(
        f"backbone: {backbone.num_edges} of {trace.graph.num_edges} edges carry {backbone.share:.1%} of the flow "
        "end to end"
    )


def _routes(trace: FlowTrace, count: int, *, is_brief: bool = False) -> Table:
    """Tabulate the widest routes."""
    title = None if is_brief else "widest routes"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=not is_brief)
    table.add_column("flow", justify="right")
    table.add_column("route", overflow="fold")
    for route in trace.routes(count):
        stops = [Text(f"{_name(trace.tokens[token])!r}[{token}]") for token in route.tokens]
        if len(stops) > 2 * _ROUTE_ENDS + 1:
            middle = Text(f"{len(stops) - 2 * _ROUTE_ENDS} more", style="dim")
            stops = [*stops[:_ROUTE_ENDS], middle, *stops[-_ROUTE_ENDS:]]
        table.add_row(f"{route.flow:.1%}", Text(" → ", style="dim").join(stops))
    return table


def _name(token: str) -> str:
    """Name a token in a list: a blank token keeps its sign, another one loses the space in front; both are short."""
    shown = visible(token)
    return shortened(shown.strip() or shown, _MAX_NAME)

"""A trace and a certificate as terminal output: the text as a heat map, a token table, the routes, the checks."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flowgraph.certificate.certify import Certificate
from flowgraph.pages import signs
from flowgraph.pages.palette import FIRST_STEP_WITH_BLACK_INK, FLOW_RAMP_ON_DARK
from flowgraph.steps.step_relevance import StepRelevance
from flowgraph.text.spans import printed_pieces, selected_text
from flowgraph.tracing.flow_trace import FlowTrace
from flowgraph.tracing.payload import token_regions

NUM_TOKEN_ROWS = 24
"""Rows of the token table, unless all tokens are listed."""

_DIM_BELOW = 0.05
_REGION_LETTERS = {"question": "Q", "reasoning": "R", "answer": "A", None: ""}
_BAR_WIDTH = 16

_SMALLEST_END = 0.005

_FOUND_AS = {
    "auto: Boxed()": "in the last box",
    "auto: NUMBER_SIGN": "after ####",
    "auto: TAG": "in the answer tag",
    "auto: PHRASE": "as a stated answer",
    "auto: LastLine()": "as the last line",
}
"""The rules by which the automatic search finds an answer, in words."""


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
        Text(),
        heat_text(trace),
        Text(),
        token_table(trace, rows),
        Text(),
    ]
    if trace.feasible:
        parts.append(_backbone(trace, keep))
        parts.append(_routes(trace, num_routes))
    else:
        message = "No flow: no question token reaches the answer through this graph."
        parts.append(Text(message, style="bold yellow"))
    return Group(*parts)


def heat_text(trace: FlowTrace) -> Text:
    """Render the text, each token on a background that grows brighter with the square root of its throughput."""
    text = Text(no_wrap=False)
    # Tokens that share a character print it once, as strong as the strongest of them.
    pieces = printed_pieces(trace.tokens, trace.spans.tolist(), trace.text)
    throughput = trace.throughput.tolist()
    printing = 0
    for index, piece in enumerate(pieces):
        if piece:
            printing = index
        throughput[printing] = max(throughput[printing], throughput[index])

    for token, region, share in zip(pieces, token_regions(trace.graph), throughput, strict=True):
        if not token:
            continue
        # The square root spreads small shares, which most tokens have.
        strength = share**0.5
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


def token_table(trace: FlowTrace, rows: int | None = NUM_TOKEN_ROWS) -> Table:
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
    table.caption = (
        "Q question, R reasoning, A answer; throughput: share of the flow that passes through the token; "
        "h: its total influence on the answer; answer tokens have no bar"
    )
    return table


def _strongest(trace: FlowTrace, rows: int) -> list[int]:
    """Choose the tokens of the table.

    Every question token carries its own share of the source, so without a limit the question would fill the table.
    """
    order: list[int] = trace.throughput.argsort(descending=True, stable=True).tolist()
    is_question = trace.question.tolist()
    question = [token for token in order if is_question[token]][: rows // 3]
    others = [token for token in order if not is_question[token]][: rows - len(question)]
    return question + others


def certificate_table(certificate: Certificate) -> RenderableType:
    """Render a certificate with one row a check: passed or failed, residual and bound, the statement in words."""
    # The first two lines of its text are the result and the figures.
    head, numbers, *_ = str(certificate).split("\n")
    table = Table(box=None, pad_edge=False, show_header=True)
    table.add_column("", overflow="fold")
    table.add_column("check", overflow="fold")
    table.add_column("residual", justify="right", overflow="fold")
    table.add_column("bound", justify="right", overflow="fold")
    table.add_column("statement", overflow="fold")
    for check in certificate.checks:
        mark = Text("✓", style="green") if check.ok else Text("✗", style="bold red")
        statement = Text(check.statement)
        if check.detail:
            statement.append(f" ({check.detail})", style="dim")
        table.add_row(mark, check.name, f"{check.residual:.1g}", f"{check.bound:.1g}", statement)
    notes = [Text(f"note: {note}") for note in certificate.notes]
    return Group(Text(head, style="bold"), Text(numbers), table, *notes)


def relevance_tree(relevance: StepRelevance) -> RenderableType:
    """Render what the answer took from which step, and that step from which; negative shares argue against it."""
    title = Text("relevance of the answer, by steps", style="bold")
    title.append(f"  (of {relevance.total:.3g} logits; conserved to {relevance.residual:.0e})", style="dim")
    lines = [title]
    for level, step, share in relevance.chain():
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
    answer = selected_text(trace.text, trace.spans[trace.answer].tolist())
    rule = trace.provenance.get("answer_selector", "")
    line = Text(f"answer: {answer!r}")
    if rule in _FOUND_AS:
        line.append(f" {_FOUND_AS[rule]}", style="dim")
    elif rule:
        line.append(f" by {rule}", style="dim")
    # The last line is the last resort of the search, and often not the answer.
    if rule.startswith("auto") and "LastLine" in rule:
        line.append(
            "\nno stated answer was found, so the last line was taken; name it with --answer or answer=", "yellow"
        )
    return line


def _backbone(trace: FlowTrace, keep: float) -> Text:
    """Describe the backbone in one line."""
    backbone = trace.backbone(keep)
    return Text(
        f"backbone: {backbone.num_edges} of {trace.graph.num_edges} edges carry {backbone.share:.1%} of the flow "
        "end to end"
    )


def _routes(trace: FlowTrace, count: int) -> Table:
    """Tabulate the widest routes."""
    table = Table(title="widest routes", title_justify="left", box=None, pad_edge=False)
    table.add_column("flow", justify="right")
    table.add_column("route", overflow="fold")
    for route in trace.routes(count):
        stops = []
        for token in route.tokens:
            # Blank tokens keep their symbol, other tokens lose the space in front.
            text = visible(trace.tokens[token])
            stops.append(Text(f"{text.strip() or text!r}[{token}]"))
        table.add_row(f"{route.flow:.1%}", Text(" → ", style="dim").join(stops))
    return table

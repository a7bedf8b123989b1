"""knockout: mask tokens, edges or routes in the attention of a model, and measure the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn

from flowgraph.analysis.routes import Route
from flowgraph.attention.layers_and_heads import LayerRule
from flowgraph.attention.masking import Cut, cutting, resolve_cut_heads, resolve_cut_layers
from flowgraph.attention.modules import attention_modules, base_model, text_config
from flowgraph.errors import InvalidInputError
from flowgraph.files import loadable
from flowgraph.graph.edge_rules import RowRule
from flowgraph.interventions.answer_logprobs import answer_logprobs, check_fits
from flowgraph.memory import require_memory
from flowgraph.tracing.flow_trace import FlowTrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BYTES = 8
_NUM_DISTRIBUTIONS = 4
"""Arrays of the size of the answer's distributions that are in memory at once."""


@loadable
@dataclass(frozen=True)
class Intervention:
    """The tokens, edges and routes that are masked together in one run; empty: nothing is masked.

    Attributes:
        tokens: no *later* position may read these; a token's own position still does.
        edges: pairs (source, target) of the graph: the attention row that belongs to target may not read source
            (see :func:`attention_cell`).
        routes: each edge of each route is masked.
        layers: ``"all"`` attention layers, ``"middle"``, ``"10-19"`` or indices.
        heads: ``"all"`` or indices of query heads.
    """

    tokens: Sequence[int] = ()
    edges: Sequence[tuple[int, int]] = ()
    routes: Sequence[Route | Sequence[int]] = ()
    layers: LayerRule = "all"
    heads: str | int | Sequence[int] = "all"

    def __post_init__(self) -> None:
        """Replace iterators by tuples, because the values are read more than once."""
        for name, value in list(vars(self).items()):
            if isinstance(value, Iterator):
                # The class is frozen: this is the assignment that its own initializer makes.
                object.__setattr__(self, name, tuple(value))


@loadable
@dataclass(frozen=True, eq=False)
class KnockoutResult:
    """The answer before and after an intervention, under teacher forcing: the trace's own tokens are read throughout.

    Attributes:
        intervention: what was masked.
        answer: ``[A]`` positions of the answer's tokens.
        before: ``[A]`` log-probability of each of them, in nats.
        after: the same after the intervention.
        greedy_before: ``[A]`` ids of the most probable token at each of them.
        greedy_after: the same after the intervention.
        kl: ``[A]`` divergence of the next-token distribution after from the one before, KL(before || after), in nats.
    """

    intervention: Intervention
    answer: Int64[Tensor, " answer"]
    before: Float64[Tensor, " answer"]
    after: Float64[Tensor, " answer"]
    greedy_before: Int64[Tensor, " answer"]
    greedy_after: Int64[Tensor, " answer"]
    kl: Float64[Tensor, " answer"]

    @property
    def change(self) -> float:
        """Change of the answer's summed log-probability, in nats; negative when the answer became less likely."""
        return float((self.after - self.before).sum())

    @property
    def flips(self) -> bool:
        """Whether the most probable token differs, before and after, at one answer position or more.

        Each position is read after the trace's own tokens; nothing is generated again. The token before the
        intervention is this model's most probable one, which may differ from the trace's answer.
        """
        return not torch.equal(self.greedy_before, self.greedy_after)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        masked = self.intervention
        routes = []
        for route in masked.routes:
            routes.append([int(token) for token in _tokens_of_route(route)])
        return {
            "intervention": {
                "tokens": [int(token) for token in masked.tokens],
                "edges": [[int(source), int(target)] for source, target in masked.edges],
                "routes": routes,
                "layers": _as_json(masked.layers),
                "heads": _as_json(masked.heads),
            },
            "answer": self.answer.tolist(),
            "before": self.before.tolist(),
            "after": self.after.tolist(),
            "greedy_before": self.greedy_before.tolist(),
            "greedy_after": self.greedy_after.tolist(),
            "kl": self.kl.tolist(),
            "logprob_before": float(self.before.sum()),
            "logprob_after": float(self.after.sum()),
            "change": self.change,
            "flips": self.flips,
        }

    def __repr__(self) -> str:
        return (
            f"KnockoutResult(log-probability of the answer {float(self.before.sum()):.4f} -> "
            f"{float(self.after.sum()):.4f}, change {self.change:+.4f}, "
            f"{'flips' if self.flips else 'does not flip'})"
        )


def knockout(
    model: nn.Module,
    trace: FlowTrace,
    *,
    tokens: Sequence[int] = (),
    edges: Sequence[tuple[int, int]] = (),
    routes: Sequence[Route | Sequence[int]] = (),
    layers: LayerRule = "all",
    heads: str | int | Sequence[int] = "all",
) -> KnockoutResult:
    r"""Run the model with and without some of its attention, and compare the probabilities of the answer.

    .. math:: A'[t, s] \propto A[t, s] \cdot [(t, s) \notin C]

    for the masked cells C. The scores are masked before the softmax, so the rest of the row sums to 1 again.

    Args:
        model: the causal LM of the trace.
        trace: the text, its answer, and the attention rows that its edges were made from.
        tokens: tokens that no later position may read; none of the answer.
        edges: (source, target) pairs of the graph.
        routes: routes of :meth:`FlowTrace.routes`, or tuples of tokens.
        layers: where the attention is masked; default all attention layers.
        heads: query heads, by index; default all.

    Returns:
        A :class:`KnockoutResult`.

    Raises:
        InvalidInputError: tokens outside the trace, twice or in the answer; edges backwards; a position left with
            nothing to read; a model that cannot read the trace.
        CaptureError: attention that cannot be masked in this model.

    Cost: two forward passes.
    """
    return knockouts(model, trace, [Intervention(tokens, edges, routes, layers, heads)])[0]


def knockouts(
    model: nn.Module,
    trace: FlowTrace,
    interventions: Sequence[Intervention],
    *,
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> list[KnockoutResult]:
    """Measure many interventions on one trace, several in each forward pass; else as :func:`knockout`.

    Args:
        model: the causal LM of the trace.
        trace: see :func:`knockout`.
        interventions: what is masked in each run.
        batch_size: runs in one forward pass.
        progress: called with a line of text before each pass.

    Returns:
        One result for each intervention.

    Raises:
        InvalidInputError: see :func:`knockout`.
        CaptureError: see :func:`knockout`.
        NumericalRangeError: logits from which the answer has no finite log-probability.
        MemoryLimitError: the distributions at the answer's positions do not fit into memory.

    Cost: 1 + interventions / batch_size forward passes; memory of a mask ``[batch, heads, T, T]`` and of the
    distributions ``[batch, answer, vocabulary]``.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidInputError(f"batch_size: must be a positive number, got {batch_size!r}; 8 is the default")
    if not isinstance(trace, FlowTrace):
        raise InvalidInputError(f"trace: must be a FlowTrace, got {type(trace).__name__}; load_trace reads a file")
    if not isinstance(interventions, Sequence) or not all(isinstance(one, Intervention) for one in interventions):
        raise InvalidInputError(
            f"interventions: must be a list of Intervention, got {interventions!r:.80}; e.g. [Intervention(tokens=[5])]"
        )
    inner = base_model(model)
    check_fits(inner, trace)

    # Refuse every invalid intervention before the first pass; the masks are built again for their batch.
    for intervention in interventions:
        _cuts(inner, trace, [intervention])

    # Distributions over the vocabulary are kept for each answer token of each row of a batch.
    answer = trace.answer.cpu().nonzero().flatten()
    rows_of_batch = min(batch_size, max(len(interventions), 1))
    num_logprobs = rows_of_batch * answer.numel() * text_config(inner).vocab_size
    require_memory(
        _NUM_DISTRIBUTIONS * _BYTES * num_logprobs,
        "batch_size",
        "use a smaller batch_size, or trace a shorter answer",
    )

    # One pass without intervention serves all.
    answer_ids = trace.token_ids.cpu()[answer]
    before = answer_logprobs(inner, trace, answer, 1)[0]
    results = []
    for start in range(0, len(interventions), batch_size):
        batch = interventions[start : start + batch_size]
        if progress is not None:
            progress(f"interventions {start + 1} to {start + len(batch)} of {len(interventions)}")
        with attention_cut(inner, trace, batch):
            after_of_batch = answer_logprobs(inner, trace, answer, len(batch))
        for intervention, after in zip(batch, after_of_batch, strict=True):
            results.append(_result(intervention, answer, answer_ids, before, after))
    return results


def _result(
    intervention: Intervention,
    answer: Int64[Tensor, " answer"],
    answer_ids: Int64[Tensor, " answer"],
    before: Float64[Tensor, "answer vocabulary"],
    after: Float64[Tensor, "answer vocabulary"],
) -> KnockoutResult:
    """Compare the distributions at the answer's positions before and after one intervention."""
    # KL(before || after) = sum p (log p - log q); a token with p = 0 adds nothing. Rounding may make it negative.
    log_ratio = (before - after).masked_fill(before == -torch.inf, 0)
    divergence = (before.exp() * log_ratio).sum(-1).clamp_min(0)
    column = answer_ids[:, None]
    return KnockoutResult(
        intervention=intervention,
        answer=answer,
        before=before.gather(1, column)[:, 0],
        after=after.gather(1, column)[:, 0],
        greedy_before=before.argmax(-1),
        greedy_after=after.argmax(-1),
        kl=divergence,
    )


def attention_cell(trace: FlowTrace, source: int, target: int) -> tuple[int, int]:
    """Find the cell (row, column) of the attention that an edge of the trace's graph was made from.

    Under ``"emission"`` rows a generated token has the row of the position before it, which generated it; then the
    edge k - 1 -> k is that position's reading of itself. Under ``"literal"`` rows a token has its own row.

    Args:
        trace: the trace.
        source: the earlier token of the edge.
        target: the later token.

    Raises:
        InvalidInputError: not two tokens of the trace in this order, or a graph that was not made from attention.
    """
    source, target = _checked_edge((source, target), trace.num_tokens)
    if source >= target:
        raise InvalidInputError(
            f"edges: must run from an earlier to a later token, got {source} -> {target}; write (source, target)"
        )
    # Under emission rows a generated token reads through the position before it.
    rows = _row_rule(trace)
    has_row_before = rows == "emission_all" or (rows == "emission" and bool(trace.generated[target]))
    row = target - 1 if has_row_before else target
    return row, source


def _row_rule(trace: FlowTrace) -> str:
    """Read which attention rows the edges were made from, in the provenance and in the graph's own rules."""
    match = re.search(r"rows=(\w+)", trace.graph.rules)
    in_graph = match[1] if match else None
    rows: Any = trace.provenance.get("rows")
    if rows is None:
        rows = in_graph

    # Both places must agree where both name a rule.
    is_contradiction = in_graph is not None and in_graph != rows
    if rows not in get_args(RowRule) or is_contradiction:
        raise InvalidInputError(
            f"trace: must say which attention rows its edges are, got provenance {rows!r} and rules "
            f"{trace.graph.rules!r}; make it with flowgraph.trace, or knock out tokens"
        )
    return rows


@contextmanager
def attention_cut(model: nn.Module, trace: FlowTrace, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Mask sequence i of each batch that this thread passes through the model as ``interventions[i]`` states.

    Inside the block, every forward pass must read the trace's text. :func:`flowgraph.capture` then captures the masked
    attention.

    Args:
        model: the causal LM of the trace.
        trace: see :func:`knockout`.
        interventions: one for each sequence of the batch.

    Raises:
        InvalidInputError: see :func:`knockout`; also a pass over another text or another number of sequences.
        CaptureError: see :func:`knockout`; also a block without a pass.
    """
    inner = base_model(model)
    with cutting(inner, _cuts(inner, trace, interventions)):
        yield


def _cuts(model: PreTrainedModel, trace: FlowTrace, interventions: Sequence[Intervention]) -> list[Cut]:
    """Check each intervention, and convert it to attention cells, layers and heads."""
    modules = attention_modules(model)
    cuts = []
    for intervention in interventions:
        layers = resolve_cut_layers(intervention.layers, model, modules)
        heads, num_heads = resolve_cut_heads(intervention.heads, model, modules)
        cells = _masked_cells(intervention, trace)
        cuts.append(Cut(cells, layers, heads, num_heads))
    return cuts


def _masked_cells(intervention: Intervention, trace: FlowTrace) -> Bool[Tensor, "tokens tokens"]:
    """Mark the cells [position, token] that the tokens, edges and routes of an intervention stand for."""
    num_tokens = trace.num_tokens
    # Each token is a column, below the diagonal.
    tokens = _checked_tokens(intervention.tokens, "tokens", num_tokens)
    repeated_token = _first_repeated(tokens)
    if repeated_token is not None:
        raise InvalidInputError(f"tokens: each may be named once, got {repeated_token} twice; remove one")
    for token in tokens:
        if bool(trace.answer[token]):
            raise InvalidInputError(
                f"tokens: must not belong to the answer, which is what is measured, got {token}; leave it out"
            )

    # Each edge is one cell.
    edges = []
    for edge in _checked_list(intervention.edges, "edges", "[(3, 9)]"):
        edges.append(_checked_edge(edge, num_tokens))
    repeated_edge = _first_repeated(edges)
    if repeated_edge is not None:
        source, target = repeated_edge
        raise InvalidInputError(f"edges: each may be named once, got {source} -> {target} twice; remove one")

    # Routes may share edges, with each other and with those above.
    for route in _checked_list(intervention.routes, "routes", "trace.routes(1)"):
        stops = _checked_tokens(_tokens_of_route(route), "routes", num_tokens)
        if len(stops) < 2:
            raise InvalidInputError(f"routes: must have at least two tokens, got {list(stops)}; or knock out tokens")
        edges += pairwise(stops)

    cells = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    cells[:, list(tokens)] = True
    # Later positions only: a token still reads itself.
    cells.tril_(-1)
    for source, target in edges:
        cells[attention_cell(trace, source, target)] = True
    return cells


def _tokens_of_route(route: Route | Sequence[int]) -> Sequence[int]:
    """Return the tokens of a route, which may be given as such."""
    if isinstance(route, Route):
        return route.tokens
    return route


def _first_repeated(values: Sequence[Any]) -> Any:
    """Return the first value that a sequence holds twice, or None."""
    if len(set(values)) == len(values):
        return None
    return next(value for value in values if values.count(value) > 1)


def _as_json(choice: Any) -> str | list[int]:
    """Convert a choice of layers or heads to a JSON value."""
    if isinstance(choice, str):
        return choice
    indices = choice if isinstance(choice, Iterable) else [choice]
    return [int(value) for value in indices]


def _checked_list(values: Any, name: str, example: str) -> Iterable[Any]:
    """Refuse an argument that is not a list."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise InvalidInputError(f"{name}: must be a list, got {values!r:.80}; e.g. {name}={example}")
    return values


def _checked_edge(edge: Any, num_tokens: int) -> tuple[int, int]:
    """Refuse an edge that is not a pair of tokens of the trace."""
    try:
        source, target = edge
    except (TypeError, ValueError):
        raise InvalidInputError(f"edges: must be pairs (source, target), got {edge!r}; e.g. edges=[(3, 9)]") from None
    source, target = _checked_tokens((source, target), "edges", num_tokens)
    return source, target


def _checked_tokens(values: Any, name: str, num_tokens: int) -> tuple[int, ...]:
    """Convert token indices to integers; refuse masks, other types and tokens outside the trace."""
    # A mask would be read as the tokens 0 and 1, so truth values are refused.
    tokens: list[int] = []
    try:
        for value in values:
            is_bool = value.dtype == torch.bool if isinstance(value, Tensor) else type(value) is bool
            if is_bool:
                _refuse_tokens(values, name)
            tokens.append(index(value))
    except TypeError:
        _refuse_tokens(values, name)
    for token in tokens:
        if not 0 <= token < num_tokens:
            raise InvalidInputError(
                f"{name}: must lie in 0..{num_tokens - 1}, the tokens of the trace, got {token}; count from the start"
            )
    return tuple(tokens)


def _refuse_tokens(values: Any, name: str) -> NoReturn:
    """Raise the error for values that are not token indices."""
    raise InvalidInputError(
        f"{name}: must be token indices, got {values!r}; of a mask they are mask.nonzero().flatten().tolist()"
    )

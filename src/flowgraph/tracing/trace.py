"""``trace``: the whole run, from a model and a text to a solved, certified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from flowgraph.attention.capture import capture
from flowgraph.attention.layers_and_heads import HeadSelector, LayerRule, resolve_layers
from flowgraph.attention.modules import base_model
from flowgraph.attention.recorder import AttentionRecorder
from flowgraph.files import PathLike, check_writable
from flowgraph.flow.solve import Absorption, SourceRule, check_options, solve
from flowgraph.graph.edge_collection import edges_kept
from flowgraph.graph.edge_rules import EdgeRules
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.memory import require_memory
from flowgraph.propagation.interface import Backend
from flowgraph.propagation.row_sources import RowSource
from flowgraph.text.encoding import EncodedText
from flowgraph.text.regions import Regions
from flowgraph.tracing.flow_trace import FlowTrace
from flowgraph.tracing.generation import Progress
from flowgraph.tracing.inputs import regions_of_ids, regions_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from flowgraph.tracing.provenance import provenance_of


def trace(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt: str | list[dict[str, Any]] | None = None,
    response: str | Sequence[int] | None = None,
    *,
    question: Any = None,
    answer: Any = None,
    reasoning: Any = None,
    input_ids: Int[Tensor, " tokens"] | None = None,
    prompt_length: int | None = None,
    layers: LayerRule = "middle",
    heads: str | Sequence[int] | HeadSelector = "mean",
    edge_weight: str = "attention",
    preset: str = "default",
    rows: str | None = None,
    self_attention: str | None = None,
    first_token: str | None = None,
    source: SourceRule | Tensor = "uniform",
    demand: Tensor | None = None,
    absorption: Absorption | None = None,
    damping: float = 1.0,
    max_edges: int | str = "auto",
    backend: Backend = "auto",
    max_new_tokens: int = 256,
    outputs: Sequence[PathLike] = (),
    progress: Progress | None = None,
) -> FlowTrace:
    """Trace how an answer drew on its question: one forward pass, a graph, an exact flow.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer; not needed with ``input_ids``.
        prompt: a string, or chat messages (rendered by the tokenizer's chat template).
        response: the model's answer, as text or generated ids; generated greedily when None.
        question: where flow enters: a role (``"user"``), ``"prompt"``, a character span, or a selector of
            :mod:`flowgraph.text.regions`; with ``input_ids`` a mask or indices. Default: the user's last message,
            or the whole prompt.
        answer: where flow leaves: a regular expression, a character span in the response, or a selector;
            with ``input_ids`` a mask or indices. Default: a boxed, marked or stated answer, else the last line.
        reasoning: with ``input_ids``: mask or indices; default: generated tokens before the answer.
        input_ids: prompt and response as ids, instead of text.
        prompt_length: with ``input_ids``: number of prompt tokens; default: up to the last question token.
        layers: ``"middle"`` (default), ``"all"``, ``"10-19"`` or indices; see :func:`flowgraph.capture`.
        heads: ``"mean"``, ``"max"``, ``"global"``, ``"local"``, ``"receiver"``, indices or a selector.
        edge_weight: ``"attention"`` or ``"value_norm"``.
        preset: ``"default"`` or ``"paper"``; ``rows``, ``self_attention`` and ``first_token`` override it one
            by one; see :class:`flowgraph.EdgeRules`.
        rows: ``"emission"``, ``"emission_all"`` or ``"literal"``.
        self_attention: ``"drop"`` or ``"renormalize"``.
        first_token: ``"exclude"`` or ``"keep"``; it is never a question token.
        source: ``"uniform"``, ``"potential"`` or a vector; this and the next three: see :func:`flowgraph.solve`.
        demand: vector of weights of the edges to the virtual sink.
        absorption: ``"absorb"`` or ``"pass_through"``.
        damping: factor per hop.
        max_edges: ``"auto"``, ``"all"`` or a number; see :meth:`flowgraph.FlowGraph.from_rows`.
        backend: see :func:`flowgraph.solve`.
        max_new_tokens: limit of the response generated when none is given.
        outputs: paths that will be written later; checked before the model runs.
        progress: called with a line of text at each stage.

    Returns:
        A :class:`FlowTrace`. An answer that no question token reaches is not an error: ``feasible`` is False.

    Raises:
        RegionError, NoAnswerError: the regions cannot be found or do not fit.
        CaptureError: the architecture cannot be captured correctly.
        MemoryLimitError: the trace would not fit, estimated before the model runs.
        InvalidInputError: any other argument outside its stated range.

    Cost: one forward pass, one or four reads of the attention rows, two sweeps over the edges.
    """
    progress = progress or (lambda line: None)
    for path in outputs:
        check_writable(path)
    # Everything that needs no forward pass is checked before one is made, generation included.
    rules = EdgeRules.preset(preset, rows=rows, self_attention=self_attention, first_token=first_token)
    check_options(backend, source, absorption, damping)
    edges_kept(max_edges, 2)
    inner = base_model(model)
    AttentionRecorder(model, layers=layers, heads=heads, edge_weight=edge_weight)
    if input_ids is not None:
        encoded, regions = regions_of_ids(
            tokenizer, input_ids, prompt, response, question, answer, reasoning, prompt_length
        )
    else:
        encoded, regions = regions_of_text(
            model, tokenizer, prompt, response, question, answer, reasoning, max_new_tokens, progress
        )
    num_tokens = encoded.input_ids.numel()
    require_room(inner, num_tokens, layers, max_edges)

    progress(f"reading the attention of {num_tokens} tokens")
    attention = capture(model, encoded.input_ids[None], layers=layers, heads=heads, edge_weight=edge_weight)
    return assemble(
        attention.sequence(0), encoded, regions, rules=rules, max_edges=max_edges, backend=backend, source=source,
        demand=demand, absorption=absorption, damping=damping, progress=progress,
        provenance=provenance_of(inner, tokenizer, regions, attention.layers, heads, edge_weight, preset, rules),
    )  # fmt: skip


def assemble(
    attention: RowSource,
    encoded: EncodedText,
    regions: Regions,
    *,
    rules: EdgeRules,
    max_edges: int | str,
    backend: Backend,
    source: SourceRule | Tensor,
    absorption: Absorption | None,
    damping: float,
    provenance: dict[str, Any],
    demand: Tensor | None = None,
    progress: Progress | None = None,
) -> FlowTrace:
    """The trace of one sequence from its attention rows; arguments as :func:`trace`.

    Raises:
        RegionError, GraphError: regions that do not fit the rows.
    """
    progress = progress or (lambda line: None)
    progress("building the graph")
    graph = FlowGraph.from_rows(
        attention,
        question=_without_first(regions.question),
        answer=regions.answer,
        reasoning=regions.reasoning,
        generated=regions.generated,
        rules=rules,
        max_edges=max_edges,
    ).to("cpu")
    progress("solving the flow")
    flow = solve(graph, backend=backend, source=source, demand=demand, absorption=absorption, damping=damping)
    return FlowTrace(
        tokens=tuple(encoded.tokens),
        token_ids=encoded.input_ids.cpu(),
        text=encoded.text,
        spans=torch.tensor(encoded.spans, dtype=torch.int64).view(-1, 2),
        generated=regions.generated,
        graph=graph,
        flow=flow,
        provenance=provenance,
    )


def _without_first(question: Tensor) -> Tensor:
    """The first token is an attention sink, never a source (unless it is all the question there is)."""
    rest = question.clone()
    rest[0] = False
    return rest if bool(rest.any()) else question


def require_room(model: nn.Module, num_tokens: int, layers: LayerRule, max_edges: int | str) -> None:
    """Refuse a trace that would not fit on the model's device, by an estimate of its queries, keys and edges.

    Raises:
        MemoryLimitError: it takes more than is free, beyond the model itself.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr]
    chosen = len(resolve_layers(layers, config.num_hidden_layers))
    # Queries and keys are about as wide as the model; twice that in float32 also covers wider heads.
    needed = 2 * 2 * 4 * config.hidden_size * chosen * num_tokens + 60 * edges_kept(max_edges, num_tokens) + 2**28
    require_memory(
        needed,
        f"trace of {num_tokens} tokens over {chosen} layers",
        "choose fewer layers, a shorter text or a smaller max_edges=",
        next(model.parameters()).device,
    )

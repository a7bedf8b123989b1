"""``trace``: from a model and a text to a solved flow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from flowgraph.attention.layers_and_heads import HeadSelector, LayerRule, resolve_layers
from flowgraph.attention.modules import attention_modules, base_model, num_layers, text_config
from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.files import PathLike, check_writable
from flowgraph.flow.compositions import LayerRows, run_composition
from flowgraph.flow.solve import Absorption, SourceRule, Vector, solve
from flowgraph.graph.edge_collection import BYTES_PER_EDGE, edges_kept
from flowgraph.graph.flow_graph import FlowGraph
from flowgraph.memory import require_memory
from flowgraph.propagation.interface import Backend
from flowgraph.propagation.row_sources import RowSource
from flowgraph.text.chat import ends_with_response
from flowgraph.text.encoding import EncodedText
from flowgraph.text.regions import Regions, last_resort
from flowgraph.tracing.flow_trace import FlowTrace
from flowgraph.tracing.generation import Progress
from flowgraph.tracing.inputs import (
    TextRequest,
    check_no_template_arguments,
    check_text_arguments,
    regions_of_ids,
    regions_of_text,
)
from flowgraph.tracing.presets import chosen_capacity
from flowgraph.tracing.provenance import composition_record, provenance_of, response_record, warn_if_truncated
from flowgraph.tracing.relevance_trace import RelevanceTrace, relevance_trace
from flowgraph.tracing.trace_options import TraceOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WORKING_MEMORY = 2**28
"""Bytes for the row blocks of the capture and of the solver."""


@overload
def trace(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt: str | list[dict[str, Any]] | None = None,
    response: str | Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    capacity: Literal["relevance"],
    capacity_options: Mapping[str, Any] | None = None,
    question: Any = None,
    answer: Any = None,
    reasoning: Any = None,
    input_ids: (
        Int[Tensor, "*one tokens"] | Int[np.ndarray, "*one tokens"] | Sequence[int] | Sequence[Sequence[int]] | None
    ) = None,
    prompt_length: int | None = None,
    attention_mask: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_edges: int | str = "auto",
    max_new_tokens: int = 256,
    outputs: Sequence[PathLike] = (),
    progress: Progress | None = None,
) -> RelevanceTrace: ...
@overload
def trace(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt: str | list[dict[str, Any]] | None = None,
    response: str | Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    preset: Literal["evidence"],
    capacity: None = None,
    capacity_options: Mapping[str, Any] | None = None,
    question: Any = None,
    answer: Any = None,
    reasoning: Any = None,
    input_ids: (
        Int[Tensor, "*one tokens"] | Int[np.ndarray, "*one tokens"] | Sequence[int] | Sequence[Sequence[int]] | None
    ) = None,
    prompt_length: int | None = None,
    attention_mask: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_edges: int | str = "auto",
    max_new_tokens: int = 256,
    outputs: Sequence[PathLike] = (),
    progress: Progress | None = None,
) -> RelevanceTrace: ...
@overload
def trace(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt: str | list[dict[str, Any]] | None = None,
    response: str | Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    question: Any = None,
    answer: Any = None,
    reasoning: Any = None,
    input_ids: (
        Int[Tensor, "*one tokens"] | Int[np.ndarray, "*one tokens"] | Sequence[int] | Sequence[Sequence[int]] | None
    ) = None,
    prompt_length: int | None = None,
    attention_mask: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    capacity: str | None = None,
    capacity_options: Mapping[str, Any] | None = None,
    layers: LayerRule | None = None,
    heads: str | Sequence[int] | HeadSelector | None = None,
    edge_weight: str = "attention",
    preset: str = "default",
    rows: str | None = None,
    self_attention: str | None = None,
    first_token: str | None = None,
    source: SourceRule | Vector = "uniform",
    demand: Vector | None = None,
    absorption: Absorption | None = None,
    damping: float = 1.0,
    max_edges: int | str = "auto",
    backend: Backend = "auto",
    max_new_tokens: int = 256,
    composition: str | None = None,
    composition_options: Mapping[str, Any] | None = None,
    outputs: Sequence[PathLike] = (),
    progress: Progress | None = None,
) -> FlowTrace: ...
def trace(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt: str | list[dict[str, Any]] | None = None,
    response: str | Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    question: Any = None,
    answer: Any = None,
    reasoning: Any = None,
    input_ids: (
        Int[Tensor, "*one tokens"] | Int[np.ndarray, "*one tokens"] | Sequence[int] | Sequence[Sequence[int]] | None
    ) = None,
    prompt_length: int | None = None,
    attention_mask: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    capacity: str | None = None,
    capacity_options: Mapping[str, Any] | None = None,
    layers: LayerRule | None = None,
    heads: str | Sequence[int] | HeadSelector | None = None,
    edge_weight: str = "attention",
    preset: str = "default",
    rows: str | None = None,
    self_attention: str | None = None,
    first_token: str | None = None,
    source: SourceRule | Vector = "uniform",
    demand: Vector | None = None,
    absorption: Absorption | None = None,
    damping: float = 1.0,
    max_edges: int | str = "auto",
    backend: Backend = "auto",
    max_new_tokens: int = 256,
    composition: str | None = None,
    composition_options: Mapping[str, Any] | None = None,
    outputs: Sequence[PathLike] = (),
    progress: Progress | None = None,
) -> FlowTrace | RelevanceTrace:
    """Trace how an answer drew on its question: one forward pass, a graph, an exact flow.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer; not needed with ``input_ids``.
        prompt: a string, or chat messages (rendered by the tokenizer's chat template).
        response: the model's answer, as text or generated ids; generated greedily when None.
        question: where flow enters: a role (``"user"``), ``"prompt"``, a character span, or one of
            :mod:`flowgraph.selectors`; with ``input_ids`` a mask or indices. Default: the user's last message,
            or the complete prompt.
        answer: where flow leaves: text of the response, a regular expression, a character span, or a selector;
            with ``input_ids`` a mask or indices. Default: the last stated answer, else the code or the sentence that
            ends the response. All but positions are searched in the final part of the response: after its thinking,
            in the final channel; see :func:`flowgraph.find_regions`.
        reasoning: with ``input_ids``: mask or indices; default: generated tokens before the answer.
        input_ids: prompt and response as ids, instead of text; a tensor, an array or a list.
        prompt_length: with ``input_ids``: number of prompt tokens; default: up to the last question token.
        attention_mask: with ``input_ids``: 1 on tokens and 0 on padding, for all ids or for the prompt. The trace
            holds the tokens without padding; masks and indices refer to the ids as given.
        chat_template_kwargs: arguments of the chat template, such as ``enable_thinking``, ``tools`` or
            ``reasoning_effort``.
        capacity: what an edge weighs: ``"attention"``, ``"vtrace_share"``, ``"vtrace"``, ``"sharp"``, ``"sharp_max"``,
            ``"centred"``, ``"value_norm"``, ``"gradient_positive"``, a registered one, or ``"relevance"``, which is
            signed and conserved. Default: that of the preset.
        capacity_options: options of the capacity, such as ``{"power": 4}`` of ``"sharpened"``, or
            ``{"contrast": "12"}`` of ``"relevance"``: why this answer and not 12.
        layers: ``"middle"``, ``"upper"``, ``"all"``, ``"10-19"``, ``"10-"`` or indices. This argument and those down
            to ``max_new_tokens`` are explained in :class:`flowgraph.tracing.trace_options.TraceOptions`.
        heads: ``"mean"``, ``"max"``, ``"global"``, ``"local"``, ``"receiver"``, indices or a selector.
        edge_weight: ``"attention"`` or ``"value_norm"``.
        preset: ``"default"``, ``"paper"``, ``"evidence"`` or ``"steps"``: names capacity and edge rules for a question;
            see :class:`flowgraph.tracing.trace_options.TraceOptions`.
        rows: ``"emission"``, ``"emission_all"`` or ``"literal"``; overrides the preset.
        self_attention: ``"drop"`` or ``"renormalize"``; overrides the preset.
        first_token: ``"exclude"`` or ``"keep"``; overrides the preset.
        source: ``"uniform"``, ``"potential"`` or a vector.
        demand: vector of weights of the edges to the virtual sink.
        absorption: ``"absorb"`` or ``"pass_through"``.
        damping: factor per hop.
        max_edges: ``"auto"``, ``"all"`` or a number.
        backend: of the solver.
        max_new_tokens: limit of a generated response.
        composition: how edges become ``trace.scores``: ``"flowtracer"``, ``"cage"``, ``"vtrace"``, ``"hops"``,
            ``"one_hop"``, ``"katz"``, ``"rollout"`` or a registered one; see :func:`flowgraph.compose`. None: the
            throughput, or the potential where rows leak.
        composition_options: its options by name.
        outputs: paths that will be written later; checked before the model runs.
        progress: called with a line of text at each stage.

    Returns:
        A :class:`FlowTrace`. An answer that no question token reaches is not an error: ``feasible`` is False. With
        ``capacity="relevance"`` a :class:`RelevanceTrace`, whose ``scores`` are signed.

    Raises:
        RegionError, NoAnswerError: the regions cannot be found or do not fit.
        CaptureError: the architecture cannot be captured correctly.
        MemoryLimitError: the trace would not fit, estimated before the model runs.
        OutputError: one of ``outputs`` cannot be written.
        InvalidInputError: any other argument outside its stated range.

    Warns:
        UserWarning: no answer is stated, and the end of an unfinished response, or all of a long one, was taken.

    Cost: one forward pass, one or four reads of the attention rows, two sweeps over the edges.
    """
    report = progress or _ignore
    # One record for the choices, which every stage below reads.
    options = TraceOptions(
        capacity=chosen_capacity(capacity, preset),
        capacity_options=capacity_options,
        layers=layers,
        heads=heads,
        edge_weight=edge_weight,
        preset=preset,
        rows=rows,
        self_attention=self_attention,
        first_token=first_token,
        source=source,
        demand=demand,
        absorption=absorption,
        damping=damping,
        max_edges=max_edges,
        backend=backend,
        max_new_tokens=max_new_tokens,
        composition=composition,
        composition_options=composition_options,
    )

    # Every check that needs no forward pass comes before the first one, which may generate the response.
    for path in outputs:
        check_writable(path)
    options.check(model)
    inner = base_model(model)

    # Tokens and regions: from ids with masks, or from text, whose response may be generated here.
    was_generated = False
    guess = None
    if input_ids is not None:
        if prompt is not None or response is not None:
            raise InvalidInputError("input_ids: replaces prompt and response, got both; pass one or the other")
        check_no_template_arguments(chat_template_kwargs)
        encoded, regions = regions_of_ids(
            inner,
            tokenizer,
            input_ids,
            question=question,
            answer=answer,
            reasoning=reasoning,
            prompt_length=prompt_length,
            attention_mask=attention_mask,
        )
    else:
        check_text_arguments(tokenizer, prompt, reasoning, attention_mask)
        request = TextRequest(
            prompt,  # type: ignore[arg-type]
            response,
            question=question,
            answer=answer,
            chat_template_kwargs=chat_template_kwargs,
        )
        encoded, regions = regions_of_text(inner, tokenizer, request, max_new_tokens, report)  # type: ignore[arg-type]
        was_generated = response is None and not ends_with_response(prompt)  # type: ignore[arg-type]
        guess = last_resort(regions.answer_by, encoded)

    # How the response came about, and a warning where it was cut off.
    num_tokens = encoded.input_ids.numel()
    response_facts = response_record(
        inner,
        tokenizer,
        encoded.input_ids[encoded.prompt_length :],
        was_generated=was_generated,
        max_new_tokens=max_new_tokens,
    )
    # A guess at the answer of a cut response says that it was cut.
    if guess:
        warnings.warn(guess, stacklevel=2)
    else:
        warn_if_truncated(response_facts, stacklevel=3)

    # Relevance is conserved by itself; every other capacity gets a graph and a solved flow.
    if options.is_signed:
        return assemble_relevance(model, tokenizer, encoded, regions, options, response_facts, report)
    require_trace_memory(inner, num_tokens, options.chosen_layers, max_edges)

    # The pass records queries and keys; rows are computed in blocks while the graph is built.
    report(f"reading the attention of {num_tokens} tokens")
    attention = options.capture(model, encoded.input_ids[None], answer=regions.answer[None])
    provenance = provenance_of(inner, tokenizer, regions, attention.layers, options, response_facts, encoded)
    return assemble(attention.sequence(0), encoded, regions, options, provenance, report)


def _ignore(line: str) -> None:
    """Ignore a line of progress."""


def assemble_relevance(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    encoded: EncodedText,
    regions: Regions,
    options: TraceOptions,
    response_facts: dict[str, Any],
    progress: Progress = _ignore,
) -> RelevanceTrace:
    """Compute the relevance of the answer of one text: one forward pass, and a backward pass per hop.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: needed with a contrast.
        encoded: the tokens and text.
        regions: question, reasoning and answer.
        options: the choices of the trace.
        response_facts: how the response was made.
        progress: called before the pass.

    Raises:
        CaptureError: the model has a part without a linear rule.
        InvalidInputError: options outside their range, or an answer without a demand.
    """
    progress(f"computing the relevance of the answer over {encoded.input_ids.numel()} tokens")
    inner = base_model(model)
    provenance = provenance_of(inner, tokenizer, regions, (), options, response_facts, encoded)
    return relevance_trace(
        model,
        tokenizer,
        tokens=tuple(encoded.tokens),
        token_ids=encoded.input_ids.cpu(),
        text=encoded.text,
        spans=torch.tensor(encoded.spans, dtype=torch.int64).view(-1, 2),
        question=regions.question,
        reasoning=regions.reasoning,
        answer=regions.answer,
        generated=regions.generated,
        provenance=provenance,
        max_edges=options.max_edges,
        **(options.capacity_options or {}),
    )


def assemble(
    attention: RowSource,
    encoded: EncodedText,
    regions: Regions,
    options: TraceOptions,
    provenance: dict[str, Any],
    progress: Progress = _ignore,
) -> FlowTrace:
    """Build the graph of one sequence from its attention rows, and solve the flow on it.

    Args:
        attention: attention rows of the sequence, aggregated over layers and heads.
        encoded: its tokens and text.
        regions: its question, reasoning and answer.
        options: the choices of the trace.
        provenance: what was run, for the record.
        progress: called before each stage.

    Returns:
        The trace, on the CPU.

    Raises:
        RegionError, GraphError: regions that do not fit the rows.
    """
    # Capacities c(s, t) from the attention rows, by the edge rules; with a limit, the edges with most flow.
    progress("building the graph")
    graph = FlowGraph.from_rows(
        attention,
        question=_question(regions, options),
        answer=regions.answer,
        reasoning=regions.reasoning,
        generated=regions.generated,
        rules=options.rules,
        max_edges=options.max_edges,
    ).to("cpu")

    # Potentials h = b + N^T h, source q = src / h, influence g = q + N g, throughput f = g h.
    progress("solving the flow")
    flow = solve(
        graph,
        backend=options.backend,
        source=options.source,
        demand=options.demand,
        absorption=options.absorption,
        damping=options.damping,
    )

    # Scores of the tokens, where a composition was chosen.
    composed = None
    if options.chosen_composition is not None:
        progress("composing the scores")
        chosen, complete = options.chosen_composition
        layer_rows = LayerRows.of(attention, graph, regions.generated) if chosen.reads_layers else None
        composed = run_composition(chosen, graph, complete, generated=regions.generated, layer_rows=layer_rows)
        provenance = {**provenance, "composition": composition_record(composed)}
    return FlowTrace(
        tokens=tuple(encoded.tokens),
        token_ids=encoded.input_ids.cpu(),
        text=encoded.text,
        spans=torch.tensor(encoded.spans, dtype=torch.int64).view(-1, 2),
        generated=regions.generated,
        graph=graph,
        flow=flow,
        provenance=provenance,
        composed=None if composed is None else composed.scores.detach(),
    )


def _question(regions: Regions, options: TraceOptions) -> Tensor:
    """Choose the question tokens of the graph.

    The first token is an attention sink. While its edges are excluded, it is left out of a question that was found; a
    question that names it keeps it, although nothing enters there. A question of the first token alone is refused.

    Raises:
        RegionError: no other token is in the question.

    Warns:
        UserWarning: the first token was named.
    """
    question = regions.question
    if not bool(question[0]) or options.rules.first_token == "keep":
        return question
    if int(question.sum()) == 1:
        raise RegionError(
            "question: must hold a token besides the first one, whose edges are excluded as those of an attention "
            "sink, got the first token alone; pass first_token='keep', or a longer question"
        )
    # A region found automatically is narrowed without a notice.
    if regions.question_selector.startswith(("auto", "Prompt(")):
        rest = question.clone()
        rest[0] = False
        return rest
    # The user chose a region with this token: it stays in the region, but no flow can enter there.
    selector = regions.question_selector
    named = "the mask or indices given" if selector == "mask" else selector
    warnings.warn(
        "question: the first token carries no flow, because edges of this attention sink are excluded, got it in "
        f"{named}; pass first_token='keep' to let flow enter there",
        UserWarning,
        stacklevel=3,
    )
    return question


def require_trace_memory(model: PreTrainedModel, num_tokens: int, layers: LayerRule, max_edges: int | str) -> None:
    """Refuse a trace that would not fit on the model's device, by an estimate of its queries, keys and edges.

    Args:
        model: the transformers model, without wrappers.
        num_tokens: T, padding included.
        layers: the choice of layers.
        max_edges: the limit of edges.

    Raises:
        MemoryLimitError: the trace takes more than is free, beyond the model itself.
    """
    total_layers = num_layers(model, attention_modules(model))
    num_chosen = len(resolve_layers(layers, total_layers))

    # Queries and keys are about as wide as the model; twice that in float32 also covers wider heads.
    bytes_per_token = 2 * 2 * 4 * text_config(model).hidden_size
    recorded = bytes_per_token * num_chosen * num_tokens
    edges = BYTES_PER_EDGE * edges_kept(max_edges, num_tokens)
    require_memory(
        recorded + edges + _WORKING_MEMORY,
        f"trace of {num_tokens} tokens over {num_chosen} layers",
        "choose fewer layers, a shorter text or a smaller max_edges=",
        next(model.parameters()).device,
    )

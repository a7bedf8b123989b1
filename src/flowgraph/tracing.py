"""``trace``: the whole run, from a model and a text to a solved, certified flow."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from flowgraph.attention.capture import capture
from flowgraph.attention.modules import base_model
from flowgraph.attention.recorder import AttentionRecorder
from flowgraph.attention.selection import HeadSelector, LayerRule, resolve_layers
from flowgraph.collecting import edges_kept
from flowgraph.edges import EdgeRules
from flowgraph.errors import InvalidInputError, RegionError
from flowgraph.files import PathLike, check_writable
from flowgraph.flowtrace import FlowTrace
from flowgraph.graph import FlowGraph
from flowgraph.memory import require_memory
from flowgraph.propagation.backends import Backend
from flowgraph.regions import Regex, Regions, find_regions
from flowgraph.solving import Absorption, SourceRule, check_options, solve
from flowgraph.text import EncodedText, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str], None]


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
            :mod:`flowgraph.regions`; with ``input_ids`` a mask or indices. Default: the user's last message,
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
    say = progress or (lambda line: None)
    for path in outputs:
        check_writable(path)
    # Everything that needs no forward pass is checked before one is made, generation included.
    rules = EdgeRules.preset(preset, rows=rows, self_attention=self_attention, first_token=first_token)
    check_options(backend, source, absorption, damping)
    edges_kept(max_edges, 2)
    inner = base_model(model)
    AttentionRecorder(model, layers=layers, heads=heads, edge_weight=edge_weight)
    if input_ids is not None:
        encoded, regions = _from_ids(tokenizer, input_ids, prompt, response, question, answer, reasoning, prompt_length)
    else:
        encoded, regions = _from_text(
            model, tokenizer, prompt, response, question, answer, reasoning, max_new_tokens, say
        )
    num_tokens = encoded.input_ids.numel()
    _require_room(inner, num_tokens, layers, max_edges)

    say(f"reading the attention of {num_tokens} tokens")
    attention = capture(model, encoded.input_ids[None], layers=layers, heads=heads, edge_weight=edge_weight)
    say("building the graph")
    graph = FlowGraph.from_rows(
        attention.sequence(0),
        question=_without_first(regions.question),
        answer=regions.answer,
        reasoning=regions.reasoning,
        generated=regions.generated,
        rules=rules,
        max_edges=max_edges,
    ).to("cpu")
    say("solving the flow")
    flow = solve(graph, backend=backend, source=source, demand=demand, absorption=absorption, damping=damping)
    provenance = _provenance(inner, tokenizer, regions, attention.layers, heads, edge_weight, preset, rules)
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


def _from_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | list[dict[str, Any]] | None,
    response: str | Sequence[int] | None,
    question: Any,
    answer: Any,
    reasoning: Any,
    max_new_tokens: int,
    say: Progress,
) -> tuple[EncodedText, Regions]:
    if tokenizer is None or prompt is None:
        missing = "tokenizer" if tokenizer is None else "prompt"
        raise InvalidInputError(
            f"{missing}: must be given unless input_ids is, got None; pass trace(model, tokenizer, prompt, ...)"
        )
    if reasoning is not None:
        raise InvalidInputError(
            "reasoning: goes with input_ids only, got a value with text; it is found between question and answer"
        )
    if isinstance(answer, str):
        Regex(answer)
    if isinstance(prompt, str) and not prompt.strip():
        raise RegionError("prompt: must hold text, got only blanks; ask the question there")
    ends_with_answer = not isinstance(prompt, str) and bool(prompt) and prompt[-1].get("role") == "assistant"
    if response is None and not ends_with_answer:
        response = generate_response(model, tokenizer, prompt, max_new_tokens, say)
    encoded = encode(tokenizer, prompt, response)
    return encoded, find_regions(encoded, question=question, answer=answer)


def _from_ids(
    tokenizer: PreTrainedTokenizerBase | None,
    input_ids: Tensor,
    prompt: Any,
    response: Any,
    question: Any,
    answer: Any,
    reasoning: Any,
    prompt_length: int | None,
) -> tuple[EncodedText, Regions]:
    if prompt is not None or response is not None:
        raise InvalidInputError("input_ids: replaces prompt and response, got both; pass one or the other")
    input_ids = torch.as_tensor(input_ids)
    if input_ids.ndim == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.ndim != 1 or input_ids.is_floating_point() or input_ids.numel() < 2:
        raise InvalidInputError(
            f"input_ids: must be one sequence of at least 2 token ids, got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}; trace the sequences of a batch one by one"
        )
    question, answer, reasoning = (_one_row(region) for region in (question, answer, reasoning))
    for name, region in (("question", question), ("answer", answer)):
        if region is None:
            raise InvalidInputError(f"{name}: must be a mask or indices with input_ids, got None; a regex needs text")
    count = input_ids.numel()
    if prompt_length is not None and not 0 < prompt_length < count:
        raise InvalidInputError(
            f"prompt_length: must lie in 1..{count - 1}, got {prompt_length}; it counts the prompt's tokens"
        )
    generated = None if prompt_length is None else torch.arange(count) >= prompt_length
    regions = Regions.from_masks(question, answer, reasoning=reasoning, generated=generated, num_tokens=count)
    pieces = [tokenizer.decode([token]) if tokenizer else f"<{token}>" for token in input_ids.tolist()]
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
    encoded = EncodedText(
        input_ids=input_ids.long(),
        tokens=tuple(str(piece) for piece in pieces),
        spans=tuple(zip([0, *ends[:-1]], ends, strict=True)),
        text="".join(str(piece) for piece in pieces),
        prompt_length=int((~regions.generated).sum()),
        response_start=ends[max(int((~regions.generated).sum()) - 1, 0)],
        special=torch.zeros(count, dtype=torch.bool),
    )
    return encoded, regions


def _one_row(region: Any) -> Any:
    """A mask of shape [1, T], as it stands beside input_ids of that shape, is a mask over T tokens."""
    return region[0] if isinstance(region, Tensor) and region.ndim == 2 and region.shape[0] == 1 else region


def generate_response(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, Any]],
    max_new_tokens: int,
    say: Progress,
) -> list[int]:
    """Greedy response ids, the end token included.

    Raises:
        InvalidInputError: ``max_new_tokens`` below 1, or a prompt that leaves no room in the context.
    """
    if max_new_tokens < 1:
        raise InvalidInputError(f"max_new_tokens: must be at least 1, got {max_new_tokens}; 256 is the default")
    from transformers import GenerationConfig

    prompt_ids = encode(tokenizer, prompt, [0]).input_ids[:-1]  # exactly the ids that the trace will read
    inner = base_model(model)
    limit = getattr(inner.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, limit - prompt_ids.numel())
    if max_new_tokens < 1:
        raise InvalidInputError(
            f"prompt: must leave room in the context of {limit} tokens, got {prompt_ids.numel()}; shorten it"
        )
    stop = inner.generation_config.eos_token_id if inner.generation_config else None
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop if stop is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    ids = prompt_ids[None].to(inner.get_input_embeddings().weight.device)  # type: ignore[operator]
    say(f"generating up to {max_new_tokens} tokens")
    with torch.no_grad():
        output = inner.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=_Counter(say, ids.shape[1])
        )
    return [int(token) for token in output[0, ids.shape[1] :]]


class _Counter:
    """A generation streamer that reports how many tokens there are."""

    def __init__(self, say: Progress, prompt_length: int) -> None:
        self.say, self.count = say, -prompt_length

    def put(self, value: Tensor) -> None:
        self.count += value.numel()
        if self.count > 0:
            self.say(f"generating: {self.count} tokens")

    def end(self) -> None:
        pass


def _without_first(question: Tensor) -> Tensor:
    """The first token is an attention sink, never a source (unless it is all the question there is)."""
    rest = question.clone()
    rest[0] = False
    return rest if bool(rest.any()) else question


def _require_room(model: nn.Module, num_tokens: int, layers: LayerRule, max_edges: int | str) -> None:
    """Estimate what a trace takes beyond the model: queries and keys of the chosen layers, and the edges."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr]
    chosen = len(resolve_layers(layers, config.num_hidden_layers))
    # Queries and keys are about as wide as the model; twice that in float32 also covers wider heads.
    needed = 2 * 2 * 4 * config.hidden_size * chosen * num_tokens + 60 * edges_kept(max_edges, num_tokens) + 2**28
    require_memory(
        needed,
        f"trace of {num_tokens} tokens over {chosen} layers",
        "choose fewer layers, a shorter text or a smaller max_edges=",
    )


def _provenance(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    regions: Regions,
    layers: tuple[int, ...],
    heads: Any,
    edge_weight: str,
    preset: str,
    rules: EdgeRules,
) -> dict[str, Any]:
    config = model.config  # type: ignore[union-attr]
    return {
        "model": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "architecture": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokenizer": type(tokenizer).__name__ if tokenizer is not None else None,
        "layers": list(layers),
        "heads": heads if isinstance(heads, str) else str(heads),
        "edge_weight": edge_weight,
        "preset": preset,
        "rows": rules.rows,
        "self_attention": rules.self_attention,
        "first_token": rules.first_token,
        "question_selector": regions.question_selector,
        "answer_selector": regions.answer_selector,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("flowgraph-llm", "torch", "transformers", "torch-geometric")},
        },
    }

"""``trace`` from end to end on a tiny random model: what it holds, and what it refuses."""

import copy
import io

import pytest
import torch
from rich.console import Console

from flowgraph import (
    FlowGraph,
    FlowTrace,
    InvalidInputError,
    MemoryLimitError,
    NoAnswerError,
    OutputError,
    RegionError,
    capture,
    load_trace,
    solve,
    trace,
)
from flowgraph.commands.terminal import render_trace
from flowgraph.selectors import LastLine
from flowgraph.tracing.generation import generate_response
from flowgraph.tracing.trace import require_trace_memory
from tests.fixtures.tiny import PROMPT, RESPONSE, chat, tiny, tiny_model
from tests.fixtures.tokenizers import byte_level


@pytest.fixture(scope="module")
def example() -> FlowTrace:
    return trace(*tiny(), chat(), RESPONSE)


def test_a_chat_trace_is_complete_and_certified(example: FlowTrace):
    assert example.feasible
    assert example.certify().ok
    assert "".join(example.tokens[t] for t in example.answer.nonzero().flatten().tolist()).strip() == "7"
    asked = "".join(example.tokens[t] for t in example.question.nonzero().flatten().tolist())
    assert asked == PROMPT
    assert bool(example.generated[example.reasoning].all())
    assert example.text.endswith(RESPONSE)
    assert example.throughput.shape == (example.num_tokens,)
    assert [example.text[a:b] for a, b in example.spans.tolist()] == list(example.tokens)
    record = example.provenance
    assert (record["layers"], record["heads"], record["rows"], record["preset"]) == ([1], "mean", "emission", "default")
    assert record["answer_selector"].startswith("auto")
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]


def test_how_the_answer_was_found_is_recorded_and_shown(example: FlowTrace):
    assert example.provenance["answer_by"] == "phrase"
    assert "\n  answer: '7' (phrase)\n" in repr(example)
    assert "answer: '7' as a stated answer\n" in shown(example)
    given = trace(*tiny(), chat(), RESPONSE, answer="7")
    assert given.provenance["answer_by"] == "given: Literal"
    assert "answer: '7' by Literal(text='7')\n" in shown(given)
    masks = trace(tiny_model(), input_ids=example.token_ids, question=example.question, answer=example.answer)
    assert masks.provenance["answer_by"] == "given: mask"


def test_a_guess_is_said_to_be_one():
    model, tokenizer = tiny()
    with pytest.warns(UserWarning, match="answer: should be stated before the response ends, got a response that was"):
        made = trace(model, tokenizer, chat(), max_new_tokens=3)
    assert made.provenance["answer_by"] == "whole response, unfinished text"
    assert "(whole response, unfinished text)" in repr(made)
    assert "cut off before it stated an answer, so the whole response was taken; name it with --answer" in shown(made)
    # The same text given as a response is not known to be cut off.
    again = trace(model, tokenizer, chat(), made.token_ids[made.generated])
    assert again.provenance["answer_by"] == "whole response"


def test_thinking_holds_no_answer():
    model, tokenizer = tiny()
    found = trace(model, tokenizer, chat(), "<think>The answer is 12.</think> The answer is 7.")
    assert repr(found).splitlines()[1] == "  answer: '7' (phrase)"
    with pytest.raises(NoAnswerError, match="got a response with a thinking block that is not closed"):
        trace(model, tokenizer, chat(), "<think>The answer is 12.")


def shown(trace: FlowTrace) -> str:
    """The trace as the terminal shows it, without line breaks at its edge."""
    console = Console(width=400, file=io.StringIO())
    console.print(render_trace(trace))
    return console.file.getvalue().replace(" \n", "\n")  # type: ignore[attr-defined]


def test_it_is_the_sum_of_its_parts(example: FlowTrace):
    """Capture, graph and solve one by one give the same throughput."""
    rows = capture(tiny_model(), example.token_ids[None])
    graph = FlowGraph.from_rows(
        rows.dense()[0],
        question=example.question,
        answer=example.answer,
        reasoning=example.reasoning,
        generated=example.generated,
    )
    assert torch.equal(graph.edge_index, example.graph.edge_index)
    assert torch.allclose(graph.capacity, example.graph.capacity, atol=1e-6)


def test_a_plain_prompt_and_every_way_to_name_the_answer():
    model, tokenizer = tiny()
    by_regex = trace(model, tokenizer, PROMPT, RESPONSE, answer=r"answer is (\d+)")
    by_span = trace(model, tokenizer, PROMPT, RESPONSE, answer=(RESPONSE.rindex("7"), RESPONSE.rindex("7") + 1))
    assert torch.equal(by_regex.answer, by_span.answer)
    assert not by_regex.question[0]  # an attention sink is never a source
    whole = trace(model, tokenizer, PROMPT, RESPONSE, answer=LastLine())
    assert whole.answer.sum() > by_regex.answer.sum()
    assert not whole.reasoning.any()


def test_the_paper_s_preset_and_single_choices():
    model, tokenizer = tiny()
    paper = trace(model, tokenizer, chat(), RESPONSE, preset="paper")
    assert paper.graph.rules == "rows=literal, self_attention=drop, first_token=keep"
    mixed = trace(model, tokenizer, chat(), RESPONSE, preset="paper", rows="emission", source="potential", damping=0.5)
    assert mixed.provenance["rows"] == "emission"
    assert mixed.flow.damping == 0.5
    assert mixed.flow.source_rule == "potential"
    assert mixed.certify().ok


def test_ids_and_masks_without_a_tokenizer(example: FlowTrace):
    bare = trace(
        tiny_model(),
        input_ids=example.token_ids,
        question=example.question,
        answer=example.answer,
        reasoning=example.reasoning,
        prompt_length=int((~example.generated).sum()),
    )
    assert torch.equal(bare.throughput, example.throughput)
    assert bare.tokens[0] == f"<{int(example.token_ids[0])}>"
    named = trace(
        tiny_model(),
        byte_level(),
        input_ids=example.token_ids[None],
        question=[5, 6],
        answer=[-1 + len(example.tokens)],
    )
    assert named.tokens[10] == byte_level().decode([int(example.token_ids[10])])


def test_the_response_is_generated_when_none_is_given():
    model, tokenizer = tiny()
    ids = generate_response(model, tokenizer, chat(), 12, lambda line: None)
    assert 1 <= len(ids) <= 12
    stages: list[str] = []
    with pytest.warns(UserWarning, match="cut off"):
        made = trace(model, tokenizer, chat(), max_new_tokens=12, answer=LastLine(), progress=stages.append)
    assert made.token_ids[made.generated].tolist() == ids
    assert any(line.startswith("generating: ") for line in stages)
    assert stages[-1] == "solving the flow"


def test_an_assistant_message_at_the_end_is_the_response(example: FlowTrace):
    told = trace(*tiny(), [*chat(), {"role": "assistant", "content": RESPONSE}])
    assert told.feasible
    assert told.tokens[int(told.answer.nonzero()[0])].strip() == "7"


def test_saving_and_loading_changes_nothing(example: FlowTrace, tmp_path):
    path = tmp_path / "t.safetensors"
    example.save(path)
    again = load_trace(path)
    for name in ("token_ids", "spans", "generated"):
        assert torch.equal(getattr(again, name), getattr(example, name))
    for name in ("h", "g", "throughput", "source", "demand", "absorbing", "feasible", "alpha"):
        assert torch.equal(getattr(again.flow, name), getattr(example.flow, name)), name
    assert torch.equal(again.graph.capacity, example.graph.capacity)
    assert again.provenance == example.provenance
    assert repr(again) == repr(example)
    assert again.to_dict() == example.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_the_old_name_of_the_potential_warns(example: FlowTrace):
    with pytest.warns(DeprecationWarning, match=r"^h: is deprecated, got FlowTrace\.h; use FlowTrace\.potential$"):
        old = example.h
    assert torch.equal(old, example.potential)
    assert torch.equal(old, example.flow.potentials[0])


def test_the_upper_layers_are_those_from_one_third_up():
    upper = trace(*tiny(), chat(), RESPONSE, layers="upper")
    assert upper.provenance["layers"] == [1, 2]
    assert torch.equal(upper.throughput, trace(*tiny(), chat(), RESPONSE, layers="1-").throughput)


def test_repr_shows_sizes_and_hubs(example: FlowTrace):
    text = repr(example)
    assert text.startswith(f"FlowTrace of LlamaForCausalLM: {example.num_tokens} tokens (question ")
    assert "unit flow, mean route" in text
    assert "hubs in the reasoning:" in text


def test_an_unreachable_answer_is_said_plainly():
    identity = torch.eye(6)
    graph = FlowGraph.from_rows(identity, question=[1], answer=[5], preset="paper")
    made = FlowTrace(
        tuple("abcdef"),
        torch.arange(6),
        "abcdef",
        torch.tensor([[k, k + 1] for k in range(6)]),
        torch.ones(6).bool(),
        graph,
        solve(graph),
    )
    assert not made.feasible
    assert "no flow: no question token reaches the answer" in repr(made)
    payload = made.to_dict()
    assert (payload["feasible"], payload["backbone"], payload["routes"]) == (False, None, [])
    assert payload["summary"]["alpha"] is None


def test_a_pruned_trace_says_so():
    pruned = trace(*tiny(), chat(), RESPONSE, max_edges=300)
    assert pruned.graph.num_edges == 300
    assert "pruned: " in repr(pruned)
    assert pruned.certify().ok


MODEL, TOKENIZER = tiny()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((PROMPT, RESPONSE), {"answer": r"#### (.*)"}, NoAnswerError, r"answer: .*####"),
        ((PROMPT, ""), {}, RegionError, r"response: "),
        (("", RESPONSE), {}, RegionError, r"prompt: "),
        ((None, RESPONSE), {}, InvalidInputError, r"prompt: must be given unless input_ids is, got None"),
        ((PROMPT, RESPONSE), {"reasoning": [3]}, InvalidInputError, r"reasoning: goes with input_ids only"),
        (
            (PROMPT, RESPONSE),
            {"layers": "5-9"},
            InvalidInputError,
            r"layers: must lie in 0..2, got 5..9",
        ),
        ((PROMPT, RESPONSE), {"heads": [7]}, InvalidInputError, r"heads: must lie in 0..3, got 7..7"),
        ((PROMPT, RESPONSE), {"heads": "best"}, InvalidInputError, r"heads: must be 'mean', 'max'"),
        (
            (PROMPT, RESPONSE),
            {"edge_weight": "norm"},
            InvalidInputError,
            r"edge_weight: must be 'attention' or 'value_norm'",
        ),
        ((PROMPT, RESPONSE), {"preset": "mine"}, InvalidInputError, r"preset: must be one of"),
        ((PROMPT, RESPONSE), {"damping": 2.0}, InvalidInputError, r"damping: must lie in"),
        ((PROMPT, RESPONSE), {"max_edges": 0}, InvalidInputError, r"max_edges: must be"),
        (
            (PROMPT,),
            {"max_new_tokens": 0},
            InvalidInputError,
            r"max_new_tokens: must be at least 1, an integer, got 0",
        ),
        ((PROMPT,), {"max_new_tokens": 2.5}, InvalidInputError, r"max_new_tokens: must be .* an integer, got 2.5"),
        ((PROMPT,), {"max_new_tokens": "3"}, InvalidInputError, r"max_new_tokens: must be .* an integer, got '3'"),
        ((PROMPT * 30, RESPONSE), {}, InvalidInputError, r"input_ids: must fit the model's context of 512 tokens, got"),
        ((PROMPT * 30,), {}, InvalidInputError, r"prompt: must leave space in the context of 512 tokens, got"),
    ],
)
def test_bad_input_with_text(arguments: tuple, options: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        trace(MODEL, TOKENIZER, *arguments, **options)


@pytest.mark.unchecked
@pytest.mark.parametrize("prompt", [["x"], [None], ("x",), 5, b"x", {"role": "user"}, [{}], [{"content": "x"}]])
@pytest.mark.parametrize("response", [RESPONSE, None])
def test_what_is_no_prompt(prompt, response: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowgraph.tracing.inputs.generate_response", lambda *a: pytest.fail("the model ran"))
    with pytest.raises(InvalidInputError, match=r"prompt: must be text or a list of chat messages, .*; pass one conv"):
        trace(MODEL, TOKENIZER, prompt, response)


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_messages_without_text_are_refused_before_anything_is_generated(messages, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowgraph.tracing.inputs.generate_response", lambda *a: pytest.fail("the model ran"))
    with pytest.raises(RegionError, match=r"prompt: must hold text in the 'content' of a message, got"):
        trace(MODEL, TOKENIZER, messages)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("response", "message"),
    [
        ([10**30, 5], r"response: ids must lie in 0..359, the model's vocabulary, got 10{30};"),
        ([60, 360], r"response: ids must lie in 0..359, the model's vocabulary, got 360;"),
        (7, r"response: must be text or a list of token ids, got 7;"),
        (b"x", r"response: must be text or a list of token ids, got b'x';"),
        ({60, 61}, r"response: must be text or a list of token ids, got \{"),
    ],
)
def test_what_is_no_response(response, message: str):
    with pytest.raises(InvalidInputError, match=message):
        trace(MODEL, TOKENIZER, chat(), response)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"input_ids": "abc", "question": [0], "answer": [1]},
            InvalidInputError,
            r"input_ids: must be a tensor or list",
        ),
        (
            {"input_ids": [[1, 2], [3]], "question": [0], "answer": [1]},
            InvalidInputError,
            r"input_ids: must be a tensor",
        ),
        (
            {"input_ids": torch.ones(5).bool(), "question": [0], "answer": [4]},
            InvalidInputError,
            r"input_ids: must be integers of shape .* got torch.bool",
        ),
        (
            {"input_ids": torch.arange(5), "question": [0], "answer": [4], "prompt_length": 2.5},
            InvalidInputError,
            r"prompt_length: must lie in 1..4, got 2.5",
        ),
        (
            {"input_ids": torch.arange(5), "question": [0], "answer": [4], "prompt_length": True},
            InvalidInputError,
            r"prompt_length: must lie in 1..4, got True",
        ),
        (
            {"input_ids": torch.arange(5), "question": "user", "answer": [4]},
            RegionError,
            r"question: must be a mask or indices with input_ids, got 'user'; text needs a prompt",
        ),
        (
            {"input_ids": torch.arange(1), "question": [0], "answer": [0]},
            InvalidInputError,
            r"input_ids: must be one sequence of at least 2 token ids",
        ),
        (
            {"input_ids": torch.ones(3), "question": [0], "answer": [2]},
            InvalidInputError,
            r"input_ids: must be integers of shape .* got torch.float32",
        ),
        (
            {"input_ids": torch.ones(2, 3).long(), "question": [0], "answer": [2]},
            InvalidInputError,
            r"trace the sequences of a batch one by one",
        ),
        (
            {"input_ids": torch.arange(5), "answer": [4]},
            InvalidInputError,
            r"question: must be a mask or indices with input_ids, got None",
        ),
        (
            {"input_ids": torch.arange(5), "question": [0], "answer": [4], "prompt": "x"},
            InvalidInputError,
            r"input_ids: replaces prompt and response",
        ),
        (
            {"input_ids": torch.arange(5), "question": [0], "answer": [4], "prompt_length": 5},
            InvalidInputError,
            r"prompt_length: must lie in 1..4, got 5",
        ),
        ({"input_ids": torch.arange(5), "question": [0], "answer": [5]}, RegionError, r"answer: .*5"),
        ({"input_ids": torch.arange(5), "question": [0, 4], "answer": [4]}, RegionError, r"4"),
        (
            {"input_ids": torch.arange(5), "question": torch.ones(4).bool(), "answer": [4]},
            RegionError,
            r"question: .*5.*4",
        ),
        (
            {"input_ids": torch.full((5,), 9999), "question": [0], "answer": [4]},
            InvalidInputError,
            r"input_ids: must lie in 0..359, got 9999..9999",
        ),
    ],
)
def test_bad_input_with_ids(options: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        trace(MODEL, **options)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "options",
    [{"damping": 0}, {"source": "x"}, {"heads": "x"}, {"layers": "9-9"}, {"answer": "(unclosed"}, {"max_edges": -1}],
)
def test_options_are_checked_before_anything_is_generated(options: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowgraph.tracing.inputs.generate_response", lambda *a: pytest.fail("the model ran"))
    with pytest.raises(InvalidInputError):
        trace(MODEL, TOKENIZER, PROMPT, **options)


def test_masks_shaped_like_a_batch_of_one_are_accepted(example: FlowTrace):
    one = {"question": example.question[None], "answer": example.answer[None]}
    assert torch.equal(trace(MODEL, input_ids=example.token_ids[None], **one).question, example.question)


def test_memory_is_estimated_before_the_model_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowgraph.memory.available_bytes", lambda device="cpu": 10**6)
    monkeypatch.setattr("flowgraph.tracing.trace_options.capture", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(MemoryLimitError, match=r"trace of \d+ tokens over 1 layers: would need about .* GiB"):
        trace(MODEL, TOKENIZER, PROMPT, RESPONSE)


def test_memory_is_estimated_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def available(device: torch.device | str = "cpu") -> float:
        asked.append(str(device))
        return float("inf")

    monkeypatch.setattr("flowgraph.memory.available_bytes", available)
    require_trace_memory(copy.deepcopy(tiny_model()).to("meta"), 100, "middle", "auto")
    assert asked == ["meta"]


def test_outputs_are_checked_before_the_model_runs(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr("flowgraph.tracing.trace_options.capture", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(OutputError, match=r"path: its folder must exist, got .*missing"):
        trace(MODEL, TOKENIZER, PROMPT, RESPONSE, outputs=[tmp_path / "missing" / "t.json"])
    with pytest.raises(OutputError, match=r"path: must name a file, got the folder"):
        trace(MODEL, TOKENIZER, PROMPT, RESPONSE, outputs=[tmp_path])

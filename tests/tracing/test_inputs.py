"""Ids, padding, template arguments and the first token on their way into a trace; the record of how a text was made."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from flowgraph import (
    FlowGraph,
    FlowTrace,
    InvalidInputError,
    RegionError,
    TraceFileError,
    capture,
    compare,
    solve,
    solve_rows,
    trace,
)
from flowgraph.files import restored
from flowgraph.selectors import LastLine, Prompt, Regex, Tokens
from flowgraph.text.encoding import encode_ids
from tests.fixtures import tokenizers as tiny_tokenizers
from tests.fixtures.tiny import PROMPT, RESPONSE, chat, tiny

MODEL, TOKENIZER = tiny()


def words() -> PreTrainedTokenizerFast:
    """A sentencepiece vocabulary of words, whose decoder strips the space of the first token it is given."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "▁Tom", "▁ate", "▁3.", "▁He", "▁slept."])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


class TestIds:
    """Ids are decoded as generated ids are, not one by one."""

    def test_characters_of_several_tokens(self) -> None:
        text = "Tom 🍎 ate 3. He slept. 答案是七。"
        ids = TOKENIZER(text)["input_ids"]
        made = trace(MODEL, TOKENIZER, input_ids=ids, question=[1, 2], answer=[len(ids) - 1], prompt_length=9)
        assert made.text == text
        assert "\ufffd" not in "".join(made.tokens)
        by_text = trace(MODEL, TOKENIZER, "Tom 🍎 ate", " 3. He slept. 答案是七。", answer="。")
        assert made.tokens == by_text.tokens
        assert made.spans.tolist() == by_text.spans.tolist()

    def test_words_keep_their_blanks(self) -> None:
        tokenizer = words()
        ids = tokenizer("Tom ate 3. He slept.")["input_ids"]
        made = trace(MODEL, tokenizer, input_ids=ids, question=[1], answer=[4], prompt_length=2)
        assert made.text == tokenizer.decode(ids) == "Tom ate 3. He slept."
        assert made.tokens == ("Tom", " ate", " 3.", " He", " slept.")
        by_text = trace(MODEL, tokenizer, "Tom ate", " 3. He slept.", question=Tokens([1]), answer=Tokens([4]))
        assert [step.text for step in made.steps().steps] == [step.text for step in by_text.steps().steps]
        assert torch.equal(made.throughput, by_text.throughput)

    @pytest.mark.parametrize("name", [name for name in tiny_tokenizers.EVERY if name != "slow_bytes"])
    def test_the_text_is_what_the_tokenizer_decodes(self, name: str) -> None:
        tokenizer = tiny_tokenizers.EVERY[name]()
        ids = tokenizer("Tom has 3 apples. Answer: 42")["input_ids"]
        encoded = encode_ids(tokenizer, torch.tensor(ids), 4)
        assert encoded.text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert encoded.special.tolist() == [index in tokenizer.all_special_ids for index in ids]

    @pytest.mark.unchecked
    def test_arrays_lists_and_masks_are_alike(self) -> None:
        ids = torch.tensor(TOKENIZER(PROMPT + RESPONSE)["input_ids"])
        num_tokens, prompt_length = len(ids), 20
        question = torch.arange(num_tokens) < 5
        question[0] = False
        expected = trace(MODEL, input_ids=ids, question=question, answer=[num_tokens - 2], prompt_length=prompt_length)
        forms: list[Any] = [ids.numpy(), ids.tolist(), ids[None], ids.numpy()[None], [ids.tolist()], list(ids)]
        forms += [ids.numpy().astype(np.uint16), [np.int64(index) for index in ids.tolist()]]
        questions: list[Any] = [question.numpy(), question.tolist(), question.numpy()[None], [1, 2, 3, 4], {4, 3, 2, 1}]
        questions += [range(1, 5), np.array([1, 2, 3, 4]), Tokens([1, 2, 3, 4]), slice(1, 5), (1, 2, 3, 4)]
        for form, region in itertools.zip_longest(forms, questions, fillvalue=question):
            given = ids if form is question else form
            made = trace(MODEL, input_ids=given, question=region, answer=[num_tokens - 2], prompt_length=np.int64(20))
            assert torch.equal(made.throughput, expected.throughput)

    @pytest.mark.unchecked
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"question": None}, InvalidInputError, r"question: must be a mask or indices with input_ids, got None"),
            ({"question": Regex("a")}, RegionError, r"question: must be a mask or indices with input_ids, got Regex"),
            ({"answer": LastLine()}, RegionError, r"answer: must be a mask or indices with input_ids, got LastLine"),
            (
                {"question": 3},
                RegionError,
                r"question: must be a tensor or list of numbers, or an array, got 3; pass a m",
            ),
            (
                {"question": {"a"}},
                RegionError,
                r"question: must be a tensor or list of numbers, or an array, got \{'a'\}",
            ),
            (
                {"input_ids": {"input_ids": [1]}},
                InvalidInputError,
                r"input_ids: must be a tensor or list of numbers, or",
            ),
            (
                {"input_ids": ["a", "b"]},
                InvalidInputError,
                r"input_ids: must be a tensor or list of numbers, or an array",
            ),
            (
                {"input_ids": np.array(["a"])},
                InvalidInputError,
                r"input_ids: must be a tensor or list of numbers, or an",
            ),
            (
                {"chat_template_kwargs": {"a": 1}},
                InvalidInputError,
                r"chat_template_kwargs: go with chat messages, got",
            ),
        ],
    )
    def test_what_are_no_ids_and_no_regions(self, options: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            trace(MODEL, **{"input_ids": [5, 6, 7, 8], "question": [1], "answer": [3], **options})

    def test_the_token_that_opens_a_text_twice_warns(self) -> None:
        tokenizer = tiny_tokenizers.byte_fallback()
        ids = tokenizer("<s>Tom has 3 apples.")["input_ids"]
        assert ids[:2] == [1, 1]
        message = r"^input_ids: must start once with the tokens that open a text, got '<s>' twice; tokenize rendered"
        with pytest.warns(UserWarning, match=message):
            encoded = encode_ids(tokenizer, torch.tensor(ids), 4)
        assert len(encoded.origin["warnings"]) == 1


class TestPadding:
    """A row of a padded batch gives the trace of its tokens."""

    @pytest.fixture
    def padded(self) -> tuple[PreTrainedTokenizerFast, torch.Tensor, torch.Tensor, int]:
        """Generate from a batch that is padded on the left; its shorter row, mask and length of the prompt."""
        tokenizer = tiny_tokenizers.with_template(tiny_tokenizers.byte_level(), None)
        tokenizer.pad_token, tokenizer.padding_side = "<|im_start|>", "left"
        batch = tokenizer([PROMPT, "How many?"], return_tensors="pt", padding=True)
        output = MODEL.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return tokenizer, output[1], batch["attention_mask"][1], batch["input_ids"].shape[1]

    def masks(self, row: torch.Tensor, mask: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        position = torch.arange(len(row))
        first = int(mask.argmax())
        return {"question": (position > first) & (position < length), "answer": position >= len(row) - 2}

    def test_the_mask_of_all_ids_or_of_the_prompt(self, padded: tuple) -> None:
        tokenizer, row, mask, length = padded
        num_pads = int((mask == 0).sum())
        assert num_pads > 5
        regions = self.masks(row, mask, length)
        without = {name: region[num_pads:] for name, region in regions.items()}
        right = trace(MODEL, tokenizer, input_ids=row[num_pads:], prompt_length=length - num_pads, **without)
        complete = torch.cat([mask, torch.ones(len(row) - length, dtype=mask.dtype)])
        forms: list[Any] = [complete, mask, complete[None], complete.bool(), complete.float(), complete.numpy()]
        for attention_mask in [*forms, mask.tolist()]:
            made = trace(
                MODEL, tokenizer, input_ids=row, attention_mask=attention_mask, prompt_length=length, **regions
            )
            assert torch.equal(made.throughput, right.throughput)
            assert made.tokens == right.tokens
            assert made.text == right.text
            assert made.provenance["text"]["padding_removed"] == num_pads

    def test_padding_between_prompt_and_response(self, padded: tuple) -> None:
        tokenizer, row, mask, length = padded
        num_pads = int((mask == 0).sum())
        regions = self.masks(row, mask, length)
        without = {name: region[num_pads:] for name, region in regions.items()}
        right = trace(MODEL, tokenizer, input_ids=row[num_pads:], prompt_length=length - num_pads, **without)
        order = torch.cat([torch.arange(num_pads, length), torch.arange(num_pads), torch.arange(length, len(row))])
        moved = {name: region[order] for name, region in regions.items()}
        made = trace(MODEL, tokenizer, input_ids=row[order], attention_mask=mask.flip(0), prompt_length=length, **moved)
        assert torch.equal(made.throughput, right.throughput)

    def test_padding_without_a_mask_is_refused(self, padded: tuple) -> None:
        tokenizer, row, mask, length = padded
        num_pads = int((mask == 0).sum())
        message = rf"^input_ids: must not start with padding unless attention_mask= marks it, got {num_pads} times the"
        with pytest.raises(InvalidInputError, match=message):
            trace(MODEL, tokenizer, input_ids=row, prompt_length=length, **self.masks(row, mask, length))

    def test_the_padding_token_of_the_model_counts_without_a_tokenizer(self) -> None:
        model = LlamaForCausalLM(MODEL.config.__class__(**{**MODEL.config.to_dict(), "pad_token_id": 0})).eval()
        with pytest.raises(
            InvalidInputError, match=r"input_ids: must not start with padding .*, got 2 times the padding"
        ):
            trace(model, input_ids=[0, 0, 5, 6, 7], question=[3], answer=[4])

        model.config.pad_token_id = None
        model.generation_config.pad_token_id = 0
        with pytest.raises(InvalidInputError, match=r"got 2 times the padding token 0; pass attention_mask="):
            trace(model, input_ids=[0, 0, 5, 6, 7], question=[3], answer=[4])

    def test_a_token_that_opens_texts_may_also_pad(self) -> None:
        tokenizer = tiny_tokenizers.with_template(tiny_tokenizers.byte_level(), None)
        tokenizer.pad_token = tokenizer.bos_token = "<|im_start|>"
        trace(MODEL, tokenizer, input_ids=[0, 50, 60, 70], question=[1], answer=[3])
        with pytest.raises(InvalidInputError, match=r"got 2 times the padding token 0; pass attention_mask="):
            trace(MODEL, tokenizer, input_ids=[0, 0, 60, 70], question=[2], answer=[3])

    @pytest.mark.unchecked
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (
                {"attention_mask": [1, 1, 1]},
                InvalidInputError,
                r"attention_mask: must have one entry for each of 5 ids",
            ),
            (
                {"attention_mask": [[1] * 5] * 2},
                InvalidInputError,
                r"attention_mask: must have one entry for each of 5",
            ),
            ({"attention_mask": [0, 1, 1, 1, 2]}, InvalidInputError, r"attention_mask: must hold 1 on tokens and 0 on"),
            ({"attention_mask": "x"}, InvalidInputError, r"attention_mask: must be a tensor or list of numbers, or an"),
            (
                {"attention_mask": [0, 0, 0, 0, 1]},
                InvalidInputError,
                r"attention_mask: must leave at least 2 tokens, got 1; check that",
            ),
            (
                {"attention_mask": [1, 0, 1, 1, 1]},
                RegionError,
                r"question: must hold tokens, got padding at 1 by atten",
            ),
            (
                {"attention_mask": [0, 0, 0, 1, 1], "question": [3], "prompt_length": 2},
                InvalidInputError,
                r"prompt_length: must leave tokens of prompt and response, got 2, which leaves 0 of 2 without padding",
            ),
        ],
    )
    def test_bad_masks(self, options: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            trace(MODEL, **{"input_ids": [5, 6, 7, 8, 9], "question": [1], "answer": [4], **options})

    def test_text_has_no_padding(self) -> None:
        with pytest.raises(InvalidInputError, match=r"attention_mask: goes with input_ids only, got a value with text"):
            trace(MODEL, TOKENIZER, PROMPT, RESPONSE, attention_mask=[1])


class TestFirstToken:
    """A question that names the first token keeps it."""

    @pytest.mark.parametrize("options", [{"first_token": "keep"}, {"preset": "paper"}])
    def test_with_its_edges_flow_enters_there(self, options: dict[str, str]) -> None:
        made = trace(MODEL, TOKENIZER, PROMPT, RESPONSE, question=Tokens([0, 1, 2]), **options)
        assert made.question.nonzero().flatten().tolist() == [0, 1, 2]
        assert made.flow.source[:3].tolist() == pytest.approx([1 / 3] * 3)
        assert made.certify().ok

    @pytest.mark.parametrize("question", [Tokens([0, 1, 2]), Regex("Tom has"), (0, 7), [0, 1, 2]])
    def test_without_its_edges_it_stays_and_a_warning_tells(self, question: Any) -> None:
        with pytest.warns(
            UserWarning, match=r"^question: the first token carries no flow, .*; pass first_token='keep'"
        ):
            made = trace(MODEL, TOKENIZER, PROMPT, RESPONSE, question=question)
        assert bool(made.question[0])
        assert float(made.throughput[0]) == 0
        rest = trace(MODEL, TOKENIZER, PROMPT, RESPONSE, question=Tokens(made.question.nonzero().flatten()[1:]))
        assert torch.equal(made.throughput, rest.throughput)

    def test_a_question_that_was_found_leaves_it_out(self) -> None:
        for question in (None, "prompt", Prompt()):
            assert not trace(MODEL, TOKENIZER, PROMPT, RESPONSE, question=question).question[0]

    def test_alone_it_is_refused_or_honoured(self) -> None:
        message = (
            r"^question: must hold a token besides the first one, .*, got the first token alone; pass first_token="
        )
        for arguments, options in ((("Tom", " has 7"), {}), ((PROMPT, RESPONSE), {"question": Tokens([0])})):
            with pytest.raises(RegionError, match=message):
                trace(MODEL, TOKENIZER, *arguments, **options)
        made = trace(MODEL, TOKENIZER, "Tom", " has 7", answer="7", first_token="keep")
        assert made.feasible
        assert float(made.flow.source[0]) == 1


def test_provenance_records_how_the_text_was_made() -> None:
    by_text = trace(MODEL, TOKENIZER, PROMPT, RESPONSE).provenance["text"]
    assert by_text == {
        "prompt": "text",
        "added_tokens": [],
        "response": "text",
        "response_tokenized": "with the prompt",
        "warnings": [],
    }
    by_chat = trace(MODEL, TOKENIZER, [*chat(), {"role": "assistant", "content": RESPONSE}]).provenance["text"]
    assert (by_chat["prompt"], by_chat["response"]) == ("chat", "last chat message")
    rendered = TOKENIZER.apply_chat_template(chat(), tokenize=False, add_generation_prompt=True)
    by_string = trace(MODEL, TOKENIZER, rendered, TOKENIZER(RESPONSE)["input_ids"]).provenance["text"]
    assert (by_string["prompt"], by_string["rendered_exactly"], by_string["response"]) == ("rendered chat", True, "ids")


@pytest.mark.filterwarnings("ignore:max_new_tokens. the response should end by itself")
def test_template_arguments_reach_generation_and_provenance() -> None:
    template = tiny_tokenizers.CHATML.replace("assistant\n", "assistant\n{{ effort }}")
    tokenizer = tiny_tokenizers.with_template(tiny_tokenizers.byte_level(), template)
    made = trace(
        MODEL,
        tokenizer,
        chat(),
        answer=LastLine(),
        max_new_tokens=4,
        chat_template_kwargs={"effort": "<low>"},
    )
    assert "<|im_start|>assistant\n<low>" in made.text
    assert made.provenance["text"]["chat_template_kwargs"] == {"effort": "<low>"}
    assert made.provenance["text"]["response"] == "generated"
    same = trace(
        MODEL,
        tokenizer,
        chat(),
        made.token_ids[made.generated],
        answer=LastLine(),
        chat_template_kwargs={"effort": "<low>"},
    )
    assert torch.equal(same.token_ids, made.token_ids)


def test_torch_load_reads_results_with_its_safe_default(tmp_path) -> None:
    made = trace(MODEL, TOKENIZER, chat(), RESPONSE)
    for result in (
        made,
        made.graph,
        made.flow,
        made.backbone(),
        made.steps(),
        made.certify(),
        made.routes(2),
        compare(made, made),
    ):
        buffer = io.BytesIO()
        torch.save(result, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        assert repr(loaded) == repr(result)
        if isinstance(loaded, FlowTrace):
            assert torch.equal(solve(loaded.graph).throughput, made.throughput)
            assert loaded.to_dict() == made.to_dict()
        if isinstance(loaded, FlowGraph):
            assert loaded.validate()


def test_another_process_loads_a_trace_and_nothing_else(tmp_path) -> None:
    made = trace(MODEL, TOKENIZER, chat(), RESPONSE)
    torch.save(made, tmp_path / "t.pt")
    code = "import torch, sys; import flowgraph; print(repr(torch.load(sys.argv[1])))"
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "t.pt"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == repr(made)
    assert pickle.loads(pickle.dumps(made)).to_dict() == made.to_dict()  # noqa: S301
    assert copy.deepcopy(made).to_dict() == made.to_dict()
    for module, name in (("flowgraph.files", "Path"), ("os", "system"), ("flowgraph.graph.flow_graph", "Data")):
        with pytest.raises(
            TraceFileError, match=rf"^file: must hold results of flowgraph, got {module}.{name}; write it"
        ):
            restored(module, name, {})


@pytest.mark.unchecked
def test_graphs_and_captures_take_arrays_and_lists() -> None:
    matrix = np.tril(np.ones((5, 5)))
    matrix /= matrix.sum(1, keepdims=True)
    matrix.flags.writeable = False
    expected = FlowGraph.from_rows(torch.tensor(matrix), question=[1], answer=[4])
    for rows in (matrix, matrix.tolist()):
        graph = FlowGraph.from_rows(rows, question={1}, answer=np.array([4]))
        assert torch.equal(graph.capacity, expected.capacity)
        dense = FlowGraph.from_dense(rows, question=[1], answer=[4])
        assert torch.equal(dense.capacity, torch.tensor(matrix)[dense.edge_index[1], dense.edge_index[0]])

    by_list = FlowGraph.from_edges([[0, 1], [1, 2]], [0.1, 0.5], num_nodes=3, question=[0], answer=[2])
    edges = np.array([[0, 1], [1, 2]], dtype=np.int32)
    by_array = FlowGraph.from_edges(edges, np.array([0.1, 0.5]), num_nodes=3, question=[0], answer=[2])
    # Numbers of Python keep their 53 bits, whatever the default dtype.
    assert by_list.capacity.tolist() == by_array.capacity.tolist() == [0.1, 0.5]
    uniform = solve(by_list, source=[1.0, 0, 0], demand=np.array([0.0, 0, 1]), absorption="absorb")
    assert torch.equal(uniform.throughput, solve(by_list).throughput)
    question, answer = [[True, False, False, False, False]], np.array([[False] * 4 + [True]])
    by_rows = solve_rows(matrix[None], question=question, answer=answer)
    assert torch.equal(
        by_rows.throughput[0],
        solve_rows(torch.tensor(matrix), question=torch.tensor(question), answer=torch.tensor(answer)).throughput[0],
    )

    ids = TOKENIZER(PROMPT)["input_ids"]
    mask = [1] * len(ids)
    assert torch.equal(capture(MODEL, ids, mask).dense(), capture(MODEL, torch.tensor([ids])).dense())
    assert torch.equal(capture(MODEL, np.array([ids])).dense(), capture(MODEL, torch.tensor([ids])).dense())


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: FlowGraph.from_rows((torch.ones(1, 2, 5, 5),), question=[1], answer=[4]),
            r"^rows: must be a .*capture",
        ),
        (
            lambda: FlowGraph.from_rows(np.ones((2, 5, 5)), question=[1], answer=[4]),
            r"^rows: must be a square matrix of",
        ),
        (
            lambda: FlowGraph.from_rows(torch.eye(5), question=None, answer=[4]),
            r"^question: must be .*, got None; pass a",
        ),
        (
            lambda: FlowGraph.from_rows(torch.eye(5), question="user", answer=[4]),
            r"^question: must be .*, got 'user'; p",
        ),
        (
            lambda: FlowGraph.from_edges([[0, 1], [1]], [1.0], num_nodes=2, question=[0], answer=[1]),
            r"^edge_index: must",
        ),
        (
            lambda: FlowGraph.from_edges([[0], [1]], ["a"], num_nodes=2, question=[0], answer=[1]),
            r"^capacity: must be a",
        ),
        (
            lambda: FlowGraph.from_dense("abc", question=[0], answer=[1]),
            r"^capacity: must be a tensor or list of number",
        ),
        (
            lambda: capture(MODEL, "abc"),
            r"^input_ids: must be a tensor or list of numbers, or an array, got 'abc'; token",
        ),
        (
            lambda: capture(MODEL, [[5, 6]], "x"),
            r"^attention_mask: must be a tensor or list of numbers, or an array, got",
        ),
    ],
)
def test_what_are_no_numbers(call: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call()

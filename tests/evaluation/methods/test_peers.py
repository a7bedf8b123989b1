"""Other packages are optional: without them the message says what to install, with them their scores are passed on."""

from __future__ import annotations

import copy
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

import flowgraph as fg
from flowgraph.evaluation.catalogue import find_method
from flowgraph.evaluation.methods import peers
from tests.fixtures.subjects import explained, subject
from tests.fixtures.tiny import RESPONSE, chat, tiny
from tests.fixtures.tokenizers import byte_level


@pytest.mark.parametrize("name", ["flashtrace", "inseq"])
def test_without_the_package_the_message_names_it(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    message = f"methods: '{name}' needs the package of this name, got an environment without it; run pip install {name}"
    with pytest.raises(fg.MissingExtraError, match=message):
        explained(name, subject())


def test_the_text_is_handed_over_where_its_parts_have_the_same_tokens():
    case = subject()
    prompt, response = peers._texts_as_tokenized_apart(case, "flashtrace")
    assert response == RESPONSE
    assert prompt + response == case.base.text.removesuffix(case.tokenizer.eos_token)


def test_other_tokens_are_refused():
    case = subject()
    first = int(case.token_ids[0])
    case.base.token_ids[0] = first + 1
    message = "methods: 'flashtrace' reads text, so prompt and response must give the same tokens apart, got"
    with pytest.raises(fg.InvalidInputError, match=message):
        peers._texts_as_tokenized_apart(case, "flashtrace")


@pytest.mark.skipif(importlib.util.find_spec("flashtrace") is None, reason="flashtrace is not installed")
def test_flashtrace_scores_prompt_and_response_and_attention_is_restored():
    case = subject()
    before = case.model.config._attn_implementation
    scores = explained("flashtrace", case).tokens
    assert case.model.config._attn_implementation == before
    assert float(scores[: case.prompt_length].sum()) > 0
    assert float(scores[case.reasoning].sum()) > 0


def test_inseq_needs_a_first_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "inseq", ModuleType("inseq"))
    with pytest.raises(fg.InvalidInputError, match="tokenizer, model: 'inseq' must be given a first token, got none"):
        find_method("inseq").explain(subject())


@pytest.mark.skipif(importlib.util.find_spec("inseq") is None, reason="inseq is not installed")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_inseqs_saliency_ranks_as_the_gradients_norm():
    tokenizer = byte_level().__class__(tokenizer_object=byte_level().backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = byte_level().chat_template
    tokenizer.bos_token = "<|im_start|>"
    model = copy.deepcopy(tiny()[0])
    model.config.bos_token_id = tokenizer.bos_token_id
    case = fg.Subject(model, tokenizer, fg.EvaluationItem("item", chat(), RESPONSE))
    # With one answer token, the derivative of a probability is that of its logarithm up to a factor.
    norm = explained("gradient_norm", case).tokens
    saliency = explained("inseq", case).tokens
    assert torch.equal(norm.argsort(), saliency.argsort())

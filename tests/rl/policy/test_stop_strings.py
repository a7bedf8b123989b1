"""A response ends with the token that completes a stop string, wherever tokens and texts are cut (trl#2820)."""

from __future__ import annotations

import copy

import pytest
import torch

from rl.policy.sampling import Ending, generate
from rl.policy.stop_strings import StopStrings
from rl.seeds import derive
from tests.fixtures.policies import FAMILIES, alphabet, tiny_policy
from tests.fixtures.tokenizers import byte_level

TOKENIZER = alphabet()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("a=1;a?", "b=7;c=b+1;c?", "d=2;d?")]


def sampled(family: str, *stops: str, prompts=PROMPTS):
    seeds = [derive(3, "test", row) for row in range(len(prompts))]
    ending = Ending((1,), 0, StopStrings(stops, TOKENIZER) if stops else None)
    return generate(tiny_policy(family), prompts, seeds, ending=ending, max_new_tokens=24)


def texts(generated) -> list[str]:
    rows = zip(generated.input_ids[:, generated.prompt_length :], generated.response_mask, strict=True)
    return ["".join(TOKENIZER.convert_ids_to_tokens(ids[mask].tolist())) for ids, mask in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_are_those_without_stop_strings_up_to_the_first(family: str):
    free = texts(sampled(family))
    stop = free[0][3:5]
    cut = sampled(family, stop, "?")
    found = texts(cut)
    assert found[0] == free[0][: free[0].index(stop) + 2] or "?" in free[0][:5]
    for text, whole, truncated in zip(found, free, cut.truncated.tolist(), strict=True):
        ends = [whole.index(s) + len(s) for s in (stop, "?", "<eos>") if s in whole]
        assert text == whole[: min(ends, default=len(whole))]
        assert truncated is (not ends)
    assert cut.logprobs is not None
    assert not cut.logprobs[~cut.response_mask].any()


def test_a_stop_string_in_the_prompt_ends_nothing():
    assert texts(sampled("llama", "a=1;")) == texts(sampled("llama"))


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("so <answer>3</answer>", "</answer>"),
        ("one\n\n", "\n\n"),
        ("the 🍎", "🍎"),
        ("Tom has 7 apples.", " apples"),
        ("a</s", "</s"),
    ],
)
def test_the_last_token_completes_the_text_and_no_token_before_does(text: str, stop: str):
    tokenizer = byte_level()
    stops = StopStrings((stop, "not there"), tokenizer)
    ids = tokenizer(text).input_ids
    ended = [stops.ends(ids[:length]) for length in range(1, len(ids) + 1)]
    complete = [stop in tokenizer.decode(ids[:length]) for length in range(1, len(ids) + 1)]
    assert ended == [now and not before for now, before in zip(complete, [False, *complete], strict=False)]
    assert sum(ended) == 1


def test_a_special_token_may_be_a_stop_string():
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.add_special_tokens({"additional_special_tokens": ["</answer>"]})
    ids = tokenizer("3</answer>").input_ids
    assert StopStrings(("</answer>",), tokenizer).ends(ids)
    assert not StopStrings(("</answer>",), tokenizer).ends(ids[:-1])


def test_recorded_logprobs_are_those_of_a_full_pass():
    generated = sampled("llama", "?")
    model = tiny_policy("llama")
    mask = generated.attention_mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(generated.input_ids, attention_mask=mask, position_ids=positions).logits
    start = generated.prompt_length
    tokens = generated.input_ids[:, start:]
    expected = logits[:, start - 1 : -1].log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    assert generated.logprobs is not None
    torch.testing.assert_close(
        generated.logprobs, expected.masked_fill(~generated.response_mask, 0.0), atol=1e-4, rtol=1e-4
    )

"""Every field of a request is checked, and text, ids and spans give the same sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from flowgraph import InvalidInputError
from rl.errors import ConfigError, CreditError
from rl.serving.credit_request import CreditRequest, read_json, read_request
from rl.serving.limits import ServiceLimits
from rl.serving.scorer import ModelFacts
from tests.fixtures.engines import TOKENIZER
from tests.fixtures.serving import RULES, bodies

FACTS = ModelFacts(name="tiny", tokenizer=TOKENIZER, vocabulary_size=45, context=128, dtype="float32")
IDS = bodies()[0]["ids"]
LENGTH = bodies()[0]["prompt_length"]


def read(body: Mapping[str, Any], **limits: Any) -> CreditRequest:
    return read_request(body, RULES, FACTS, ServiceLimits(**limits))


def test_ids_spans_and_text_give_the_same_sequence():
    prompt = TOKENIZER.decode(IDS[:LENGTH])
    response = TOKENIZER.decode(IDS[LENGTH:-1])
    padded = [0, 0, *IDS, 0]
    spans = {"prompt": [2, 2 + LENGTH], "response": [2 + LENGTH, 2 + len(IDS)]}
    by_ids = read({"ids": IDS, "prompt_length": LENGTH}).sequences[0]
    by_spans = read({"sequences": [{"ids": padded, "spans": spans}]}).sequences[0]
    by_text = read({"prompt": prompt, "response": response})
    assert (by_ids.prompt_ids, by_ids.response_ids) == (IDS[:LENGTH], IDS[LENGTH:])
    assert (by_spans.prompt_ids, by_spans.response_ids) == (by_ids.prompt_ids, by_ids.response_ids)
    assert (by_text.sequences[0].prompt_ids, by_text.sequences[0].response_ids) == (IDS[:LENGTH], IDS[LENGTH:-1])
    assert by_text.is_text == (True,)


def test_an_answer_in_tokens_is_one_in_characters():
    # The tokens are single characters here; the end token is none.
    by_tokens = read({"ids": IDS, "prompt_length": LENGTH, "answer": {"tokens": [6, 7]}})
    by_characters = read({"ids": IDS, "prompt_length": LENGTH, "answer": {"characters": [6, 7]}})
    assert by_tokens.answers == by_characters.answers == ((6, 7),)


def test_the_defaults_of_a_rule_are_those_of_the_service():
    credit = read({"ids": IDS, "prompt_length": LENGTH}).credit
    assert credit == RULES["reach_sharp"]
    credit = read({"ids": IDS, "prompt_length": LENGTH, "rule": "flow", "options": {"share": 1}}).credit
    assert (credit.rule, credit.share, credit.strength) == ("flow", 1.0, 1.5)


def test_the_seed_of_a_request_is_its_content():
    """A retry gets the same draws, and another request others."""
    body = {"ids": IDS, "prompt_length": LENGTH}
    first = read({**body, "request_id": "a"}).job(None).seed
    assert first == read({**body, "request_id": "b"}).job(None).seed
    assert first != read({**body, "seed": 1}).job(None).seed
    assert first != read({**body, "ids": [*IDS, 1]}).job(None).seed


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", r"body: must be JSON in UTF-8, got Expecting value.*; send one object"),
        (b'{"ids": [1, 2', r"body: must be JSON in UTF-8, got .*; send one object"),
        (b'{"ids": \xff}', r"body: must be JSON in UTF-8, got .*; send one object"),
        (b"[1]", r"body: must be a JSON object, got a list; put"),
        (b"null", r"body: must be a JSON object, got null; put"),
        (b'{"temperature": NaN}', r"body: must hold finite numbers, got NaN; leave the field out"),
        (b'{"options": {"share": -Infinity}}', r"body: must hold finite numbers, got -Infinity; leave"),
        (b'{"ids": [1], "ids": [2]}', r"body: must hold every field once, got 'ids' twice; leave"),
        (b'{"seed": ' + b"9" * 5000 + b"}", r"body: must be JSON in UTF-8, got Exceeds the limit.*; send"),
        (b"[" * 100_000, r"body: must be JSON of few levels, got too many; send"),
    ],
)
def test_malformed_json_is_refused(body: bytes, text: str):
    with pytest.raises(ConfigError, match=text):
        read_json(body)


def changed(**changes: Any) -> dict[str, Any]:
    body = {"ids": IDS, "prompt_length": LENGTH, **changes}
    return {name: value for name, value in body.items() if value is not ...}


SPANS = {"ids": IDS, "prompt_length": ...}
TEXT = {"ids": ..., "prompt_length": ..., "prompt": "a=1;a?"}
WRONG = [
    # The request.
    ({}, {"idz": IDS}, r"body: must hold known fields, got 'idz'; there are request_id, rule"),
    (
        {},
        {"rule": "vtrace"},
        r"rule: must be one that this service offers, got 'vtrace'; it offers reach_sharp, flow, e",
    ),
    ({}, {"rule": 3}, r"rule: must be one that this service offers, got 3; it offers"),
    ({}, {"rule": ["flow"]}, r"rule: must be one that this service offers, got \['flow'\]; it"),
    ({}, {"options": 3}, r"options: must be an object, got a number; write"),
    ({}, {"options": {"sign": "all"}}, r"options: must be settings of weights, got 'sign', which acts on advantages"),
    ({}, {"options": {"sare": 1}}, r"options: must hold known fields, got 'sare'; there are shape, share"),
    ({}, {"options": {"share": 2}}, r"share: must lie in \(0, 1\], got 2.0; 0.4 is"),
    ({}, {"options": {"share": float("nan")}}, r"share: must be finite, got nan; see"),
    ({}, {"options": {"floor": float("inf")}}, r"floor: must be finite, got inf; see"),
    ({}, {"options": {"share": "0.2"}}, r"share: must be float, got '0.2'; see"),
    ({}, {"options": {"shape": "sof"}}, r"shape: must be one of 'top_q', .*, got 'sof'; choose"),
    ({}, {"options": {"options": [1]}}, r"options: must be dict, got \[1\]; see"),
    ({}, {"rule": "entropy", "options": {"fallback": 0.5}}, r"credit.fallback: must be 0 with rule 'entropy', .* 0.5;"),
    ({}, {"temperature": 0}, r"temperature: must be a positive number, got 0; pass"),
    ({}, {"temperature": float("nan")}, r"temperature: must be a positive number, got nan; pass"),
    ({}, {"temperature": "1"}, r"temperature: must be a positive number, got '1'; pass"),
    ({}, {"temperature": 10**400}, r"temperature: must be a positive number, got 10+; pass"),
    ({}, {"seed": 1.0}, r"seed: must be an integer from 0 to .*, got 1.0; 0 is"),
    ({}, {"seed": True}, r"seed: must be an integer from 0 to .*, got True; 0 is"),
    ({}, {"seed": -1}, r"seed: must be an integer from 0 to .*, got -1; 0 is"),
    ({}, {"request_id": ""}, r"request_id: must be 1 to 128 printable ASCII characters, got ''; use"),
    ({}, {"request_id": 3}, r"request_id: must be 1 to 128 printable ASCII characters, got 3; use"),
    ({}, {"request_id": "ä"}, r"request_id: must be 1 to 128 printable ASCII characters, got 'ä'; use"),
    ({}, {"adapter_version": 1.5}, r"adapter_version: must be an integer or .*, got 1.5; use"),
    ({"ids": ..., "prompt_length": ...}, {}, r"sequences: must be given, got none; send"),
    ({}, {"sequences": [{}]}, r"sequences: must hold all sequences, got ids, prompt_length beside them; move"),
    (
        {"ids": ..., "prompt_length": ...},
        {"sequences": []},
        r"sequences: must be a list of .*, got an empty list; send",
    ),
    ({"ids": ..., "prompt_length": ...}, {"sequences": {}}, r"sequences: must be a list of .*, got an object; send"),
    ({"ids": ..., "prompt_length": ...}, {"sequences": [3]}, r"sequences\[0\]: must be an object, got a number; write"),
    (
        {"ids": ..., "prompt_length": ...},
        {"sequences": [{}]},
        r"sequences\[0\]: must hold ids and .*, got no field; send",
    ),
    # Ids and spans.
    ({}, {"ids": "abc"}, r"sequences\[0\].ids: must be a list of integers, got text; send"),
    ({}, {"ids": [1, 2.0]}, r"sequences\[0\].ids: must be a list of integers, got 2.0 in it; send"),
    ({}, {"ids": [1, True]}, r"sequences\[0\].ids: must be a list of integers, got True in it; send"),
    ({}, {"ids": [1, None]}, r"sequences\[0\].ids: must be a list of integers, got None in it; send"),
    ({}, {"ids": [1, [2]]}, r"sequences\[0\].ids: must be a list of integers, got \[2\] in it; send"),
    ({}, {"ids": [*IDS, 45]}, r"ids: must be integers in the vocabulary of 45 tokens, got 45 in sequence 0; use"),
    ({}, {"ids": [-1, *IDS]}, r"ids: must be integers in the vocabulary of 45 tokens, got -1 in sequence 0; use"),
    ({}, {"ids": [10**30, *IDS]}, r"ids: must be integers in the vocabulary of 45 tokens, got 10+ in sequence 0; use"),
    ({}, {"prompt_length": 0}, r"sequences\[0\].prompt_length: must be an integer from 1 to 17 for 18 ids, got 0; p"),
    ({}, {"prompt_length": 18}, r"sequences\[0\].prompt_length: must be an integer from 1 to 17 for 18 ids, got 18; p"),
    ({}, {"prompt_length": True}, r"sequences\[0\].prompt_length: must be an integer from 1 to 17 .*, got True; p"),
    ({}, {"prompt_length": "3"}, r"sequences\[0\].prompt_length: must be an integer from 1 to 17 .*, got '3'; p"),
    ({"prompt_length": ...}, {}, r"sequences\[0\]: must say where the response starts by .*, got neither; send"),
    ({}, {"spans": {}}, r"sequences\[0\]: must say where the response starts by .*, got both; send"),
    (SPANS, {"spans": [0, 3]}, r"sequences\[0\].spans: must be an object of prompt and response, got a list; write"),
    (
        SPANS,
        {"spans": {"prompt": [0, 3]}},
        r"sequences\[0\].spans: must be an object of prompt and response, got an ob",
    ),
    (
        SPANS,
        {"spans": {"prompt": [0, 3], "response": [3, 19]}},
        r"sequences\[0\].spans.response: must be \[start, end\] of ids, in 0..18 with start below end, got \[3, 19\]; ",
    ),
    (
        SPANS,
        {"spans": {"prompt": [0, 3], "response": [4, 6]}},
        r"sequences\[0\].spans: must be adjacent, got \[0, 3\] and \[4, 6\]; the response starts",
    ),
    (
        SPANS,
        {"spans": {"prompt": [-1, 3], "response": [3, 6]}},
        r"sequences\[0\].spans.prompt: must be \[start, end\] of ids, in 0..18 .*, got \[-1, 3\]; the",
    ),
    (
        SPANS,
        {"spans": {"prompt": [3, 3], "response": [3, 6]}},
        r"sequences\[0\].spans.prompt: must be \[start, end\] of ids, in 0..18 .*, got \[3, 3\]; the",
    ),
    # The answer.
    ({}, {"answer": [1, 2]}, r"sequences\[0\].answer: must be an object of characters or tokens, got a list; write"),
    ({}, {"answer": {"tokens": [7, 9]}}, r"sequences\[0\].answer.tokens: must be .* tokens of the response, in 0..8 w"),
    ({}, {"answer": {"tokens": "x"}}, r"sequences\[0\].answer.tokens: must be .* got 'x'; the end"),
    ({}, {"answer": {"characters": [3, 2]}}, r"sequences\[0\].answer.characters: must be .* got \[3, 2\]; the end"),
    ({}, {"answer": {"characters": [0, 1.0]}}, r"sequences\[0\].answer.characters: must be .* got \[0, 1.0\]; the end"),
    # Text.
    ({}, {"response": "b"}, r"sequences\[0\]: must hold ids or text, got ids and response; leave"),
    (TEXT, {"response": "b", "prompt_length": 2}, r"sequences\[0\]: must hold ids with prompt_length, got text; leave"),
    (TEXT, {"response": 3}, r"sequences\[0\].response: must be text, got a number; send"),
    (TEXT, {"response": "b", "prompt": ...}, r"sequences\[0\].prompt: must be text or messages, got none; send"),
    (
        TEXT,
        {"response": "b", "prompt": 3},
        r"sequences\[0\].prompt: must be text or a list of messages .*, got a number;",
    ),
    (
        TEXT,
        {"response": "b", "prompt": [{"role": "user"}]},
        r"sequences\[0\].prompt: must be text or .*, got a list; w",
    ),
    ({}, {"reward": "1"}, r"sequences\[0\].reward: must be a finite number, got '1'; leave"),
    ({}, {"reward": float("inf")}, r"sequences\[0\].reward: must be a finite number, got inf; leave"),
]


@pytest.mark.unchecked
@pytest.mark.parametrize(("base", "changes", "text"), WRONG)
def test_a_wrong_field_is_refused(base: dict[str, Any], changes: dict[str, Any], text: str):
    with pytest.raises((ConfigError, CreditError), match=text):
        read(changed(**{**base, **changes}))


def test_text_that_cannot_be_encoded_is_refused():
    with pytest.raises(InvalidInputError, match="surrogate"):
        read({"prompt": "a=1;a?", "response": "b\ud800"})
    with pytest.raises(InvalidInputError, match="chat template"):
        read({"prompt": [{"role": "user", "content": "a=1;a?"}], "response": "b"})


def test_too_much_is_refused():
    one = {"ids": IDS, "prompt_length": LENGTH}
    with pytest.raises(
        ConfigError, match=r"sequences: must be at most 2, got 3; send one group in a request, or start"
    ):
        read({"sequences": [one] * 3}, max_sequences=2)
    with pytest.raises(
        ConfigError, match=r"sequences\[1\]: must have at most 18 tokens \(--max-tokens\), got 19; send"
    ):
        read({"sequences": [one, {**one, "ids": [*IDS, 1]}]}, max_tokens=18)
    with pytest.raises(
        ConfigError, match=r"sequences\[0\]: must have at most 128 tokens \(the model's context\), got 135"
    ):
        read({**one, "ids": [3] * 135})
    with pytest.raises(
        ConfigError, match=r"sequences\[0\]: must have at most 9 tokens, got 4006 characters; send a sh"
    ):
        read({"prompt": "a=1;a?", "response": "b" * 4000}, max_tokens=9)

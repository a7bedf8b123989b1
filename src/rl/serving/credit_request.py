"""Read the body of a request: strict JSON, every field checked, text as token ids."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

from flowgraph import EncodedText, encode
from rl.config import CreditConfig
from rl.errors import ConfigError
from rl.integrations.engine_credit import EngineSequence, check_sequences, prompt_of
from rl.integrations.tensors import usable_rule
from rl.records import CharSpan
from rl.serving.adapters import AdapterVersion, check_version
from rl.serving.limits import ServiceLimits
from rl.serving.scorer import ModelFacts, ScoringJob

SEQUENCE_FIELDS = ("ids", "prompt_length", "spans", "prompt", "response", "answer", "reward")
"""Fields of a sequence; those of a single one may stand in the request itself."""
REQUEST_FIELDS = ("request_id", "rule", "options", "adapter_version", "temperature", "seed", "sequences")
"""Fields of a request."""

_NOT_WEIGHTS = ("rule", "entry", "sign", "normalize", "mean_one", "anneal", "potential_scale")
"""Settings of credit that act on advantages or rewards, which the service does not have."""
OPTION_FIELDS = tuple(item.name for item in fields(CreditConfig) if item.name not in _NOT_WEIGHTS)
"""Settings of credit that a request may change."""

_LONGEST_ID = 128
_SEED_BITS = 63


@dataclass(frozen=True)
class CreditRequest:
    """A request whose fields are valid.

    Attributes:
        request_id: names the request; the same name with the same content is the same request.
        digest: SHA-256 of its content without the name.
        sequences: the responses of one group, without padding.
        answers: for each the characters of the response that state its answer; None: search for it.
        is_text: for each whether it was given as text, so that its ids are part of the result.
        credit: rule, shape and scope.
        adapter_version: version that must score it; None: the current one.
        temperature: of the rollout.
        seed: of rules that draw random numbers.
    """

    request_id: str
    digest: str
    sequences: tuple[EngineSequence, ...]
    answers: tuple[CharSpan | None, ...]
    is_text: tuple[bool, ...]
    credit: CreditConfig
    adapter_version: str | None
    temperature: float
    seed: int

    def job(self, adapter: AdapterVersion | None) -> ScoringJob:
        """Return the work of this request under an adapter.

        The draws of rules with random numbers depend on the content and the seed, so that a retry gets the same ones.
        """
        drawn = hashlib.sha256(f"{self.seed} {self.digest}".encode()).digest()
        return ScoringJob(
            sequences=self.sequences,
            answers=self.answers,
            credit=self.credit,
            temperature=self.temperature,
            seed=int.from_bytes(drawn[:8], "big") >> 1,
            adapter=adapter,
        )


def read_json(body: bytes) -> dict[str, Any]:
    """Read a body as one JSON object, without NaN, infinity and repeated fields.

    Raises:
        ConfigError: anything else.

    Example:
        >>> read_json(b'{"ids": [1, 2]}')
        {'ids': [1, 2]}
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant, object_pairs_hook=_unique_fields)
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError("body: must be JSON of few levels, got too many; send one object of lists") from error
    except ValueError as error:
        # Invalid JSON, invalid UTF-8, or an integer of thousands of digits.
        raise ConfigError(f"body: must be JSON in UTF-8, got {error!s:.120}; send one object") from error
    if not isinstance(value, dict):
        raise ConfigError(f"body: must be a JSON object, got {_kind(value)}; put the sequences into one")
    return value


def read_request(
    body: Mapping[str, Any], rules: Mapping[str, CreditConfig], facts: ModelFacts, limits: ServiceLimits
) -> CreditRequest:
    """Check a request and read its sequences.

    Args:
        body: see :func:`read_json`.
        rules: settings by the name of each rule that the service offers; the first is that of requests without a rule.
        facts: of the model.
        limits: numbers of sequences and tokens.

    Raises:
        ConfigError: a field of the wrong type or outside its range, more than the limits allow, ids outside the
            vocabulary, or spans outside the text.
        CreditError: a rule or an option that the service does not have.
        InvalidInputError: messages or text that cannot be encoded.

    Cost: text is tokenised once.
    """
    _known_fields("body", body, (*REQUEST_FIELDS, *SEQUENCE_FIELDS))
    content = json.dumps({name: value for name, value in body.items() if name != "request_id"}, sort_keys=True)
    credit = _read_credit(body, rules)
    raw = _raw_sequences(body, limits)

    # Types first, then numbers of tokens, then ids: each check relies on those before.
    read = [_read_sequence(item, f"sequences[{row}]", facts, limits) for row, item in enumerate(raw)]
    sequences = tuple(sequence for sequence, _ in read)
    limit = limits.max_tokens if facts.context is None else min(limits.max_tokens, facts.context)
    _check_lengths(sequences, limit, facts.context)
    check_sequences(sequences, facts.vocabulary_size, facts.context)
    answers = []
    for row, (item, (sequence, encoded)) in enumerate(zip(raw, read, strict=True)):
        answers.append(_read_answer(item.get("answer"), f"sequences[{row}].answer", sequence, encoded, facts))

    version = body.get("adapter_version")
    return CreditRequest(
        request_id=_read_id(body.get("request_id")),
        digest=hashlib.sha256(content.encode()).hexdigest(),
        sequences=sequences,
        answers=tuple(answers),
        is_text=tuple("response" in item for item in raw),
        credit=credit,
        adapter_version=None if version is None else check_version(version),
        temperature=_read_temperature(body.get("temperature", 1.0)),
        seed=_read_seed(body.get("seed", 0)),
    )


# Fields of a request ------------------------------------------------------------------------------------


def _read_credit(body: Mapping[str, Any], rules: Mapping[str, CreditConfig]) -> CreditConfig:
    """Return the settings of the rule that a request names, with its options."""
    name = body.get("rule", next(iter(rules)))
    if not isinstance(name, str) or name not in rules:
        raise ConfigError(
            f"rule: must be one that this service offers, got {name!r:.80}; it offers {', '.join(rules)}, and --rules "
            "offers others"
        )
    options = body.get("options", {})
    if not isinstance(options, dict):
        raise ConfigError(
            f"options: must be an object, got {_kind(options)}; write {{'share': 0.2}}, or leave it out for the "
            "settings of the service"
        )
    for option in options:
        if option in _NOT_WEIGHTS:
            raise ConfigError(
                f"options: must be settings of weights, got {option!r}, which acts on advantages or rewards; apply it "
                "in the trainer with rl.integrations.tensors.scale_advantages"
            )
    _known_fields("options", options, OPTION_FIELDS)
    credit = replace(rules[name], **options)
    usable_rule(credit)
    return credit


def _raw_sequences(body: Mapping[str, Any], limits: ServiceLimits) -> list[dict[str, Any]]:
    """Return the sequences of a request as they are: those of the list, or the one in the request itself."""
    own = {name: body[name] for name in SEQUENCE_FIELDS if name in body}
    if "sequences" not in body:
        if not own:
            raise ConfigError(
                "sequences: must be given, got none; send sequences, or ids and prompt_length, or prompt and response"
            )
        return [own]
    if own:
        raise ConfigError(
            f"sequences: must hold all sequences, got {', '.join(own)} beside them; move these fields into the list"
        )
    raw = body["sequences"]
    if not isinstance(raw, list) or not raw:
        raise ConfigError(f"sequences: must be a list of at least one object, got {_kind(raw)}; send the responses")
    if len(raw) > limits.max_sequences:
        raise ConfigError(
            f"sequences: must be at most {limits.max_sequences}, got {len(raw)}; send one group in a request, or start "
            "the service with --max-sequences"
        )
    for row, item in enumerate(raw):
        if not isinstance(item, dict):
            raise ConfigError(f"sequences[{row}]: must be an object, got {_kind(item)}; write {{'ids': [...], ...}}")
        _known_fields(f"sequences[{row}]", item, SEQUENCE_FIELDS)
    return raw


def _read_id(value: Any) -> str:
    """Return the name of a request, a new one where it has none."""
    if value is None:
        return uuid.uuid4().hex
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_ID or not (value.isascii() and value.isprintable()):
        raise ConfigError(
            f"request_id: must be 1 to {_LONGEST_ID} printable ASCII characters, got {value!r:.80}; use uuid4().hex, "
            "or leave it out"
        )
    return value


def _read_temperature(value: Any) -> float:
    """Return the temperature of the rollout."""
    number = _number(value)
    if number is None or not 0 < number < math.inf:
        raise ConfigError(f"temperature: must be a positive number, got {value!r:.80}; pass that of the rollout")
    return number


def _read_seed(value: Any) -> int:
    """Return the seed of rules that draw random numbers."""
    if type(value) is not int or not 0 <= value < 2**_SEED_BITS:
        raise ConfigError(f"seed: must be an integer from 0 to 2**{_SEED_BITS} - 1, got {value!r:.80}; 0 is usual")
    return value


# Fields of a sequence -----------------------------------------------------------------------------------


def _read_sequence(
    item: Mapping[str, Any], place: str, facts: ModelFacts, limits: ServiceLimits
) -> tuple[EngineSequence, EncodedText | None]:
    """Read a sequence given as ids or as text; text comes with its tokens."""
    reward = _number(item.get("reward", 0.0))
    if reward is None or not math.isfinite(reward):
        raise ConfigError(f"{place}.reward: must be a finite number, got {item['reward']!r:.80}; leave it out for 0")
    if "ids" in item and "response" in item:
        raise ConfigError(f"{place}: must hold ids or text, got ids and response; leave one of them out")
    if "response" in item:
        return _read_text(item, place, facts, limits, reward)
    if "ids" not in item:
        raise ConfigError(
            f"{place}: must hold ids and prompt_length, or prompt and response, got {', '.join(item) or 'no field'}; "
            "send one of both"
        )
    ids = item["ids"]
    if not isinstance(ids, list) or any(type(index) is not int for index in ids):
        raise ConfigError(
            f"{place}.ids: must be a list of integers, got {_first_wrong(ids)}; send the ids of prompt and response"
        )
    prompt, response = _split(item, place, len(ids))
    # The messages that ids were made of, where decoding would not give the same ids.
    text = item.get("prompt")
    if text is not None:
        _check_prompt(text, place)
    sequence = EngineSequence(ids[slice(*prompt)], ids[slice(*response)], reward=reward, prompt=text)
    return sequence, None


def _split(item: Mapping[str, Any], place: str, num_ids: int) -> tuple[CharSpan, CharSpan]:
    """Return the ranges of the prompt and of the response in the ids."""
    if ("prompt_length" in item) == ("spans" in item):
        raise ConfigError(
            f"{place}: must say where the response starts by prompt_length or by spans, got "
            f"{'both' if 'spans' in item else 'neither'}; send one of them"
        )
    if "prompt_length" in item:
        length = item["prompt_length"]
        if type(length) is not int or not 0 < length < num_ids:
            raise ConfigError(
                f"{place}.prompt_length: must be an integer from 1 to {num_ids - 1} for {num_ids} ids, got "
                f"{length!r:.80}; prompt and response need a token each"
            )
        return (0, length), (length, num_ids)

    spans = item["spans"]
    if not isinstance(spans, dict) or set(spans) != {"prompt", "response"}:
        raise ConfigError(
            f"{place}.spans: must be an object of prompt and response, got {_kind(spans)}; write {{'prompt': [0, 12], "
            "'response': [12, 40]}"
        )
    prompt = _read_span(spans["prompt"], f"{place}.spans.prompt", num_ids, "ids")
    response = _read_span(spans["response"], f"{place}.spans.response", num_ids, "ids")
    if prompt[1] != response[0]:
        raise ConfigError(
            f"{place}.spans: must be adjacent, got {list(prompt)} and {list(response)}; the response starts where the "
            "prompt ends, and padding may stand outside of both"
        )
    return prompt, response


def _read_text(
    item: Mapping[str, Any], place: str, facts: ModelFacts, limits: ServiceLimits, reward: float
) -> tuple[EngineSequence, EncodedText]:
    """Tokenise a sequence that was given as text."""
    for name in ("prompt_length", "spans"):
        if name in item:
            raise ConfigError(f"{place}: must hold ids with {name}, got text; leave {name} out, or send ids")
    response = item["response"]
    if not isinstance(response, str):
        raise ConfigError(f"{place}.response: must be text, got {_kind(response)}; send its ids as ids")
    if "prompt" not in item:
        raise ConfigError(f"{place}.prompt: must be text or messages, got none; send what the policy answered to")
    prompt = item["prompt"]
    _check_prompt(prompt, place)

    # A token of a tokenizer covers few characters: what is far too long is refused before it is tokenised.
    longest = limits.max_tokens * 64
    num_characters = len(response) + len(prompt if isinstance(prompt, str) else json.dumps(prompt))
    if num_characters > longest:
        raise ConfigError(
            f"{place}: must have at most {limits.max_tokens} tokens, got {num_characters} characters; send a shorter "
            "response, or start the service with --max-tokens"
        )
    encoded = encode(facts.tokenizer, prompt, response, warn=False)
    ids = encoded.input_ids.tolist()
    first = encoded.prompt_length
    return EngineSequence(ids[:first], ids[first:], reward=reward, prompt=prompt), encoded


def _check_prompt(prompt: Any, place: str) -> None:
    """Check the types of a prompt; :func:`flowgraph.encode` checks its content."""
    if isinstance(prompt, str):
        return
    is_list = isinstance(prompt, list) and len(prompt) > 0
    if not is_list or not all(_is_message(message) for message in prompt):
        raise ConfigError(
            f"{place}.prompt: must be text or a list of messages with role and content, got {_kind(prompt)}; write "
            "[{'role': 'user', 'content': '...'}]"
        )


def _is_message(message: Any) -> bool:
    """Tell whether a value is a chat message of text."""
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        return False
    return isinstance(message["role"], str) and isinstance(message["content"], str)


def _check_lengths(sequences: Sequence[EngineSequence], limit: int, context: int | None) -> None:
    """Check the number of tokens of every sequence."""
    for row, sequence in enumerate(sequences):
        size = len(sequence.prompt_ids) + len(sequence.response_ids)
        if size > limit:
            origin = "the model's context" if limit == context else "--max-tokens"
            raise ConfigError(
                f"sequences[{row}]: must have at most {limit} tokens ({origin}), got {size}; send a shorter response"
            )


def _read_answer(
    value: Any, place: str, sequence: EngineSequence, encoded: EncodedText | None, facts: ModelFacts
) -> CharSpan | None:
    """Return the characters of the response that state a given answer; None where it is to be searched."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) != 1 or not set(value) <= {"characters", "tokens"}:
        raise ConfigError(
            f"{place}: must be an object of characters or tokens, got {_kind(value)}; write {{'tokens': [40, 43]}}, "
            "counted from the start of the response"
        )
    if "characters" in value:
        # The number of characters is known when the response is decoded.
        return _read_span(value["characters"], f"{place}.characters", None, "characters of the response")
    size = len(sequence.response_ids)
    first, last = _read_span(value["tokens"], f"{place}.tokens", size, "tokens of the response")
    if encoded is None:
        encoded = encode(facts.tokenizer, prompt_of(sequence, facts.tokenizer), list(sequence.response_ids), warn=False)
    # Spans count characters from the start of the prompt, an answer those of the response.
    origin = encoded.prompt_length
    start = encoded.spans[origin + first][0] - encoded.response_start
    end = encoded.spans[origin + last - 1][1] - encoded.response_start
    if start == end:
        raise ConfigError(
            f"{place}.tokens: must hold a character, got {[first, last]}, which is special tokens; give the tokens "
            "that state the answer"
        )
    return start, end


# Values of JSON -----------------------------------------------------------------------------------------


def _read_span(value: Any, place: str, size: int | None, what: str) -> CharSpan:
    """Return a range [start, end) of positions, not empty and within its text."""
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value)
    if not is_pair or not 0 <= value[0] < value[1] or (size is not None and value[1] > size):
        inside = "from 0" if size is None else f"in 0..{size}"
        raise ConfigError(
            f"{place}: must be [start, end] of {what}, {inside} with start below end, got {value!r:.80}; the end is "
            "the position after the last"
        )
    return value[0], value[1]


def _known_fields(place: str, value: Mapping[str, Any], known: Collection[str]) -> None:
    """Check that an object has no other fields than those known."""
    for name in value:
        if name not in known:
            raise ConfigError(f"{place}: must hold known fields, got {name!r:.80}; there are {', '.join(known)}")


def _number(value: Any) -> float | None:
    """Return a number of JSON as a float; None for what is none, or too large."""
    if type(value) not in (int, float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and infinity, which JSON does not have and which Python reads."""
    raise ConfigError(f"body: must hold finite numbers, got {name}; leave the field out for its default")


def _unique_fields(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, and refuse a field that it holds twice: readers differ in which one counts."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"body: must hold every field once, got {name!r:.80} twice; leave one of them out")
        found[name] = value
    return found


def _first_wrong(ids: Any) -> str:
    """Describe what is no list of integers."""
    if not isinstance(ids, list):
        return _kind(ids)
    wrong = next(index for index in ids if type(index) is not int)
    return f"{wrong!r:.80} in it"


def _kind(value: Any) -> str:
    """Name the JSON type of a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    if value == [] and isinstance(value, list):
        return "an empty list"
    return names.get(type(value), "null")

"""Every credit rule against its plain loops, on random attention and on that of a model, padded in every way."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph import AttentionRows, HeadSelector, InvalidInputError, MemoryLimitError
from flowgraph.attention.attention_rows import WeightedLayer
from flowgraph.attention.head_aggregation import HeadAggregator
from rl import AttentionNeed, CreditError, CreditInput, Responses, Sample, TokenScores, rule_names
from rl.credit import attention_rules as attention_rules
from rl.credit.registry import find_rule, score_tokens
from tests.fixtures.tiny import tiny_model
from tests.reference import rl_credit as reference

ANSWER_DIRECTED = (
    "flow", "flow_entropy", "reach", "reach_entropy", "shuffled_flow", "correlation", "atpo", "flow_sharp",
    "reach_sharp", "shuffled_flow_sharp",
)  # fmt: skip
CAPTURED = {
    "attention": AttentionNeed(),
    "layers": AttentionNeed(layers="all"),
    "local": AttentionNeed(heads=HeadSelector("distance", "lowest", 0.3)),
    "global": AttentionNeed(heads=HeadSelector("distance", "highest", 0.3)),
    "sharp": AttentionNeed(layers="1-", power=4, place="max"),
}

# Other modules of the suite register faulty rules on purpose.
# The control that permutes the weights of a batch has no scores of its own; rules of papers have a test module.
BUILT_IN = [
    name
    for name in rule_names()
    if find_rule(name).function.__module__.startswith("rl.")
    and find_rule(name).function.__module__ != "rl.credit.paper_rules"
    and name != "position_matched"
]


@dataclass(frozen=True)
class Case:
    """One sequence without padding.

    Attributes:
        ids: tokens.
        rows: by the name of the need: ``[layers, tokens, tokens]``.
        start: index of the first response token.
        question, answer: over all tokens.
        entropy, oracle, gradient: over response tokens.
    """

    ids: Tensor
    rows: Mapping[str, Tensor]
    start: int
    question: Tensor
    answer: Tensor
    entropy: Tensor
    oracle: Tensor
    gradient: Tensor

    @property
    def length(self) -> int:
        return self.ids.numel() - self.start


def region(size: int, tokens: Sequence[int]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(tokens)] = True
    return mask


def random_attention(layers: int, tokens: int) -> Tensor:
    """Spiky, and with a sink at the first token."""
    logits = 2 * torch.randn(layers, tokens, tokens)
    logits[..., 0] += 2
    return logits.masked_fill(~torch.ones(tokens, tokens).tril().bool(), -torch.inf).softmax(-1)


def random_case(seed: int, prompt: int = 6, response: int = 15, answer: Sequence[int] = (-4, -3)) -> Case:
    torch.manual_seed(seed)
    tokens = prompt + response
    layers = random_attention(3, tokens)
    return Case(
        ids=torch.randint(2, 300, (tokens,)),
        rows={
            "attention": layers.mean(0, keepdim=True),
            "layers": layers,
            "local": layers[:1],
            "global": layers[1:2],
            "sharp": layers[1:].amax(0, keepdim=True) ** 4,
        },
        start=prompt,
        question=region(tokens, range(1, prompt - 1)),
        answer=region(tokens, [tokens + place for place in answer]),
        entropy=torch.rand(response),
        oracle=torch.rand(response) < 0.3,
        gradient=torch.rand(response),
    )


def placed(cases: Sequence[Case], values: Callable[[Case], Tensor], width: int, at: Callable[[Case], int]) -> Tensor:
    """A vector of each case in a frame of zeros."""
    first = values(cases[0])
    frame = torch.zeros(len(cases), width, dtype=first.dtype)
    for row, case in zip(frame, cases, strict=True):
        row[at(case) : at(case) + values(case).numel()] = values(case)
    return frame


def responses_of(cases: Sequence[Case], left: int = 0, right: int = 0) -> Responses:
    """The cases side by side, prompts padded on the left and responses on the right, by as much again as asked."""
    prompt, response = max(c.start for c in cases) + left, max(c.length for c in cases) + right

    def over_all(values: Callable[[Case], Tensor]) -> Tensor:
        return placed(cases, values, prompt + response, lambda case: prompt - case.start)

    return Responses(
        samples=(Sample(0, "?", "!"),) * len(cases),
        completions=("",) * len(cases),
        input_ids=over_all(lambda case: case.ids),
        attention_mask=over_all(lambda case: torch.ones_like(case.question)),
        prompt_length=prompt,
        response_mask=placed(cases, lambda case: torch.ones(case.length).bool(), response, lambda _: 0),
        truncated=torch.zeros(len(cases)).bool(),
        groups=torch.zeros(len(cases)).long(),
        rewards=torch.zeros(len(cases)),
        question=over_all(lambda case: case.question),
        answer=over_all(lambda case: case.answer),
        oracle=placed(cases, lambda case: case.oracle, response, lambda _: 0),
    )


def rows_of(cases: Sequence[Case], responses: Responses, name: str) -> AttentionRows:
    layers, size = cases[0].rows[name].shape[0], responses.input_ids.shape[1]
    matrices = torch.zeros(layers, len(cases), size, size)
    for item, case in enumerate(cases):
        first, count = responses.prompt_length - case.start, case.ids.numel()
        matrices[:, item, first : first + count, first : first + count] = case.rows[name]
    records = [WeightedLayer(matrix) for matrix in matrices]
    return AttentionRows(records, range(layers), HeadAggregator("mean"), responses.attention_mask)


def captured_rows(responses: Responses) -> dict[str, AttentionRows]:
    """All needs heard in one forward pass of the tiny model."""
    mask = responses.attention_mask
    with torch.no_grad(), ExitStack() as stack:
        recorders = {
            name: stack.enter_context(need.recorder(tiny_model(), layers="middle", heads="mean"))
            for name, need in CAPTURED.items()
        }
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        tiny_model()(responses.input_ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    return {name: recorder.rows(mask, responses.input_ids) for name, recorder in recorders.items()}


def batch_of(
    cases: Sequence[Case],
    *,
    left: int = 0,
    right: int = 0,
    record: Callable[[Responses], Mapping[str, AttentionRows]] | None = None,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> CreditInput:
    responses = responses_of(cases, left, right)
    recorded = record(responses) if record else {name: rows_of(cases, responses, name) for name in CAPTURED}
    size = responses.response_length
    gradient = placed(cases, lambda case: case.gradient, size, lambda _: 0)
    return CreditInput(
        responses=responses,
        scores=TokenScores(
            logprobs=torch.zeros(responses.response_mask.shape),
            entropy=placed(cases, lambda case: case.entropy, size, lambda _: 0),
        ),
        scored=responses.response_mask,
        rows=recorded,
        random=[torch.Generator().manual_seed(seed) for seed in seeds or range(len(cases))],
        gradient=lambda: gradient,
        options=options,
    )


def eager_case(case: Case) -> Case:
    """The same sequence with what the model's own eager attention gives, heads chosen in plain loops."""
    model = copy.deepcopy(tiny_model())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = torch.cat(model(case.ids[None], output_attentions=True, use_cache=False).attentions)
    tokens = case.ids.numel()
    spans = [
        sum(float(head[t, s]) * (t - s) for t in range(tokens) for s in range(t + 1)) / tokens for head in found[1]
    ]
    middle = found[1]  # of three layers, the middle third; of four heads, 30 % is one
    rows = {
        "attention": middle.mean(0, keepdim=True),
        "layers": found.mean(1),
        "local": middle[spans.index(min(spans))][None],
        "global": middle[spans.index(max(spans))][None],
        "sharp": found[1:].amax((0, 1))[None] ** 4,
    }
    return replace(case, rows=rows)


def expected(name: str, case: Case, seed: int, **options: Any) -> list[float]:
    """The rule's plain loops."""
    A = {need: rows.mean(0).double().tolist() for need, rows in case.rows.items()}
    start, question, answer = case.start, case.question.tolist(), case.answer.tolist()
    convention = options.get("rows", "emission")
    mask = [True] * case.length
    if name == "random":
        return torch.rand(case.length, generator=torch.Generator().manual_seed(seed)).tolist()
    if name == "shuffled_flow":
        keys = torch.rand(len(question), len(question), generator=torch.Generator().manual_seed(seed)).tolist()
        A["attention"] = reference.shuffled(A["attention"], start, keys, convention)
    if name == "shuffled_flow_sharp":
        keys = torch.rand(len(question), len(question), generator=torch.Generator().manual_seed(seed)).tolist()
        A["sharp"] = reference.shuffled(A["sharp"], start, keys, convention)
    if name.endswith("_entropy"):
        alone = expected(name.removesuffix("_entropy"), case, seed, **options)
        return [score * entropy for score, entropy in zip(alone, case.entropy.tolist(), strict=True)]
    waad = reference.waad(A["local"], start, options.get("window", 10))
    fai = reference.fai(A["global"], start, options.get("near", 10), options.get("far", 50))
    sharing = {key: options[key] for key in ("share", "back", "window") if key in options}
    return {
        "uniform": lambda: [1.0] * case.length,
        "oracle": lambda: case.oracle.float().tolist(),
        "entropy": lambda: case.entropy.tolist(),
        "gradient": lambda: case.gradient.tolist(),
        "flow": lambda: reference.throughput(A["attention"], start, question, answer, convention),
        "shuffled_flow": lambda: reference.throughput(A["attention"], start, question, answer, convention),
        "reach": lambda: reference.reach(A["attention"], start, question, answer, convention),
        "max_attention": lambda: reference.max_attention(A["attention"], start),
        "flow_sharp": lambda: reference.throughput(A["sharp"], start, question, answer, convention),
        "shuffled_flow_sharp": lambda: reference.throughput(A["sharp"], start, question, answer, convention),
        "reach_sharp": lambda: reference.reach(A["sharp"], start, question, answer, convention),
        "max_attention_sharp": lambda: reference.largest_edge(A["sharp"], start, convention),
        "wrong_sink": lambda: reference.wrong_sink(
            A["sharp"], start, question, answer, torch.Generator().manual_seed(seed), convention
        ),
        "correlation": lambda: reference.correlation(A["attention"], start, answer),
        "waad": lambda: waad,
        "fai": lambda: fai,
        "coupled": lambda: reference.coupled(waad, fai, mask, **sharing),
        "atpo": lambda: reference.atpo(case.rows["layers"][-1].tolist(), start, answer, options.get("floor", 0.5)),
    }[name]()


OPTIONS: dict[str, dict[str, Any]] = {
    "fai": {"near": 2, "far": 5},
    "waad": {"window": 3},
    "coupled": {"near": 2, "far": 6, "window": 4, "share": 0.3, "back": 0.25},
    "atpo": {"floor": 0.2},
    "flow": {"rows": "literal"},
    "flow_entropy": {"rows": "literal"},
    "reach": {"rows": "literal"},
    "reach_entropy": {"rows": "literal"},
    "shuffled_flow": {"rows": "literal"},
    "flow_sharp": {"rows": "literal"},
    "reach_sharp": {"rows": "literal"},
    "max_attention_sharp": {"rows": "literal"},
    "shuffled_flow_sharp": {"rows": "literal"},
    "wrong_sink": {"rows": "literal"},
}
CASES = [
    random_case(0),
    random_case(1, prompt=4, response=11, answer=(-6, -5, -1)),
    random_case(2, response=13, answer=()),
]


def agree(found: Tensor, wanted: list[float], tolerance: float = 1e-6) -> None:
    assert found[: len(wanted)].tolist() == pytest.approx(wanted, abs=tolerance, rel=tolerance)
    assert not found[len(wanted) :].any(), "padding scores 0"


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("changed", [False, True])
def test_every_rule_is_its_plain_loops(name: str, changed: bool, monkeypatch: pytest.MonkeyPatch):
    options = OPTIONS.get(name, {}) if changed else {}
    if changed:
        monkeypatch.setattr(attention_rules, "BLOCK", 4)  # many blocks, none of them even
    batch = batch_of(CASES, left=2, right=3, seeds=[5, 6, 7], **options)
    scores = score_tokens(find_rule(name), batch)
    for found, case, seed in zip(scores, CASES, (5, 6, 7), strict=True):
        agree(found, expected(name, case, seed, **options))


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_rule_on_the_attention_of_a_model(name: str):
    """Several recorders with different layers and heads hear one padded pass; the twin reads eager attention."""
    options = OPTIONS.get(name, {})
    cases = [random_case(3), random_case(4, prompt=9, response=8, answer=(-2, -1))]
    batch = batch_of(cases, left=1, right=2, record=captured_rows, seeds=[8, 9], **options)
    scores = score_tokens(find_rule(name), batch)
    for found, case, seed in zip(scores, cases, (8, 9), strict=True):
        agree(found, expected(name, eager_case(case), seed, **options), 1e-5)


@pytest.mark.parametrize("model", [False, True], ids=["random", "captured"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_company_and_padding_change_nothing(name: str, model: bool):
    case, longer, shorter = random_case(10), random_case(11, 9, 40), random_case(12, 3, 5, answer=(-1,))
    rule, record, seed = find_rule(name), captured_rows if model else None, 77
    options = OPTIONS.get(name, {})

    def scores(*others: Case, first: bool = True, **padding: int) -> Tensor:
        cases = [case, *others] if first else [*others, case]
        seeds = [seed, *range(len(others))] if first else [*range(len(others)), seed]
        batch = batch_of(cases, record=record, seeds=seeds, **padding, **options)
        found = score_tokens(rule, batch)
        assert found.shape == batch.responses.response_mask.shape
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()
        assert (found >= 0).all()
        assert not found[~batch.responses.response_mask].any()
        return found[0 if first else -1]

    alone = scores()
    assert torch.equal(alone, scores()), "seeded draws repeat"
    assert alone.any(), "a case in which every rule has something to say"
    for padded in (
        scores(left=5),
        scores(right=7),
        scores(left=3, right=2),
        scores(longer, shorter),
        scores(longer, shorter, first=False),
    ):
        torch.testing.assert_close(padded[: case.length], alone, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ANSWER_DIRECTED)
def test_without_an_answer_there_is_no_score_and_no_error(name: str):
    silent = random_case(20, answer=())
    batch = batch_of([silent, replace(silent, question=region(21, ()))])
    assert not score_tokens(find_rule(name), batch).any()
    mixed = score_tokens(find_rule(name), batch_of([silent, random_case(21)]))
    assert not mixed[0].any()
    assert mixed[1].any()


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_shortest_responses(name: str):
    """A response that is nothing but its answer, and one of a single token beside it."""
    cases = [random_case(22, 3, 2, answer=(-2, -1)), random_case(23, 3, 1, answer=())]
    scores = score_tokens(find_rule(name), batch_of(cases))
    assert scores.shape == (2, 2)
    assert torch.isfinite(scores).all()
    if name not in ("uniform", "random", "entropy", "gradient", "oracle"):
        assert not scores[1].any()


def test_constant_attention_correlates_with_nothing_and_divides_by_nothing():
    case = random_case(24)
    flat = torch.ones(1, 21, 21).tril() / torch.arange(1, 22)[:, None]
    constant = torch.full((1, 21, 21), 0.01).tril()
    for rows in (flat, constant, torch.eye(21)[None]):
        batch = batch_of([replace(case, rows=dict.fromkeys(CAPTURED, rows))])
        for name in ("correlation", "atpo", "flow", "shuffled_flow", "fai", "waad", "coupled"):
            assert torch.isfinite(score_tokens(find_rule(name), batch)).all()
    batch = batch_of([replace(case, rows=dict.fromkeys(CAPTURED, constant))])
    assert not score_tokens(find_rule("correlation"), batch).any()
    assert score_tokens(find_rule("atpo"), batch)[0, :10].tolist() == pytest.approx([0.5] * 10, abs=0.01)


FOUR = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.4, 0.2, 0.3]])


def four_tokens(start: int) -> Case:
    size = 4 - start
    return Case(
        ids=torch.arange(4) + 2,
        rows=dict.fromkeys(CAPTURED, FOUR[None]),
        start=start,
        question=region(4, [1] if start > 1 else []),
        answer=region(4, [3]),
        entropy=torch.full((size,), 2.0),
        oracle=torch.zeros(size).bool(),
        gradient=torch.zeros(size),
    )


def scores_by_hand(name: str, start: int, **options: Any) -> list[float]:
    return score_tokens(find_rule(name), batch_of([four_tokens(start)], **options))[0].tolist()


def test_flow_worked_by_hand():
    """Token 1 asks, token 3 answers. Emission: token 2 reads row 1, all of it token 1; token 3 reads row 2, .3 and .5
    of .8. So 5/8 of the flow passes token 2. Literal: token 2 reads .3/.8 from token 1, token 3 .4/.9 and .2/.9."""
    assert scores_by_hand("flow", 2) == pytest.approx([0.625, 1.0])
    assert scores_by_hand("flow_entropy", 2) == pytest.approx([1.25, 2.0])
    assert scores_by_hand("reach", 2) == pytest.approx([0.625, 1.0])
    through, direct = (2 / 9) * (3 / 8), 4 / 9
    assert scores_by_hand("flow", 2, rows="literal") == pytest.approx([through / (through + direct), 1.0])
    assert scores_by_hand("reach", 2, rows="literal") == pytest.approx([2 / 9, 1.0])


def test_baselines_worked_by_hand():
    """Tokens 1 to 3 respond. Column 1 is read with .3 and .4, column 2 with .2, column 3 by nobody."""
    assert scores_by_hand("max_attention", 1) == pytest.approx([0.4, 0.2, 0])
    assert scores_by_hand("fai", 1, near=1, far=2) == pytest.approx([0.35, 0.2, 0])
    assert scores_by_hand("fai", 1, near=2, far=2) == pytest.approx([0.4, 0, 0])
    # W_1 = .5, W_2 = .2 * 2 + .3 = .7, W_3 = .1 * 2 + .4 * 2 + .2 = 1.2 with spans of at most 2
    assert scores_by_hand("waad", 1, window=2) == pytest.approx([0.2, 0.5, 0])
    assert scores_by_hand("waad", 1) == pytest.approx([0.2, 0.6, 0])
    # Preplan is token 2 (.6), the anchor token 1 (.35), before it: it keeps its own
    assert scores_by_hand("coupled", 1, near=1, far=2, share=0.3) == [1, 1, 0]


def test_an_anchor_shares_with_the_nearest_preplan_token_before_it():
    local = torch.zeros(1, 7, 7)
    for token, span in enumerate((0, 0, 1, 1, 1, 3, 3)):  # the reach changes after tokens 1 and 4
        local[0, token, token - span] = 1
    received = torch.eye(7)[None]
    received[0, 6, 2], received[0, 6, 3] = 0.9, 0.8  # anchors: tokens 2 and 3, which follow preplan token 1
    case = random_case(30, 1, 6, answer=())
    case = replace(case, rows={**dict.fromkeys(CAPTURED, received), "local": local})
    rule, sharing = find_rule("coupled"), {"near": 1, "far": 5, "share": 1 / 3}
    assert score_tokens(rule, batch_of([case], **sharing))[0].tolist() == [2, 0.5, 0.5, 1, 0, 0]
    assert score_tokens(rule, batch_of([case], **sharing, window=1))[0].tolist() == [
        1.5,
        0.5,
        1,
        0,
        0,
        0,
    ]  # spans are cut
    assert score_tokens(rule, batch_of([case], **sharing, back=0.0))[0].tolist() == [1, 1, 1, 1, 0, 0]


def test_coupled_ranks_only_tokens_that_compete():
    case = random_case(31)
    batch = batch_of([case], near=1, far=4)
    among = batch.responses.response_mask & ~batch.responses.answer_in_response
    A = {name: case.rows[name][0].double().tolist() for name in ("local", "global")}
    waad, fai = reference.waad(A["local"], case.start), reference.fai(A["global"], case.start, 1, 4)
    wanted = reference.coupled(waad, fai, among[0].tolist())
    assert wanted != reference.coupled(waad, fai, [True] * case.length)
    agree(score_tokens(find_rule("coupled"), replace(batch, scored=among))[0], wanted)


@pytest.mark.parametrize("rows", ["emission", "literal"])
def test_shuffling_moves_what_is_read_and_keeps_how_much(rows: str):
    from rl.credit.flow_rules import _shuffled

    case = random_case(40, 4, 8)
    before = case.rows["attention"][0]
    own = torch.ones(12).bool() if rows == "literal" else torch.arange(12) < 4
    after = _shuffled(before, own, torch.Generator().manual_seed(0))
    torch.testing.assert_close(after.sort(-1).values, before.sort(-1).values, atol=0, rtol=0)
    assert not after.triu(1).any()
    assert torch.equal(after[:, 0], before[:, 0])
    kept = after.diagonal() == before.diagonal()
    assert kept[own].all()
    assert int((after != before).sum()) > 30


def test_random_scores_differ_between_responses_and_seeds():
    case, rule = random_case(50), find_rule("random")
    one, two = score_tokens(rule, batch_of([case, case], seeds=[1, 2]))
    assert not torch.equal(one, two)
    assert torch.equal(score_tokens(rule, batch_of([case], seeds=[2]))[0], two)
    for name in ("random", "shuffled_flow"):
        with pytest.raises(CreditError, match=r"random: must be one generator for each of 2 responses, got 0; pass"):
            find_rule(name).function(replace(batch_of([case, case]), random=()))


@pytest.mark.unchecked
def test_requests_that_cannot_be_met():
    batch = batch_of([random_case(60)])
    flow, fai = find_rule("flow"), find_rule("fai")
    with pytest.raises(CreditError, match=r"rows: must hold the attention 'attention' that .*, got \[\]; record"):
        score_tokens(flow, replace(batch, rows={}))
    other = batch_of([random_case(60)], right=1).rows
    with pytest.raises(CreditError, match=r"rows: 'global' must be the attention of 1 x 21 tokens, got 1 x 22; record"):
        score_tokens(fai, replace(batch, rows=other))
    with pytest.raises(InvalidInputError, match=r"rows: must be one of 'emission', .*got 'emmission'"):
        score_tokens(flow, replace(batch, options={"rows": "emmission"}))
    with pytest.raises(CreditError, match=r"gradient: must be a function .*, got none; register"):
        score_tokens(find_rule("gradient"), replace(batch, gradient=None))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fai", {"windw": 3}, r"options: must be options of this rule, got 'windw'; there are near, far"),
        ("flow", {"share": 0.3}, r"options: must be options of this rule, got 'share'; there are none"),
        ("max_attention", {"share": 0.3}, r"options: must be options of this rule, got 'share'; there are none"),
        ("correlation", {"near": 3}, r"options: must be options of this rule, got 'near'; there are none"),
        ("fai", {"near": 0}, r"options: near must be a whole number of at least 1, got 0; 10 is the default"),
        ("fai", {"near": 9, "far": 4}, r"options: far must be at least near \(9\), got 4; 10 and 50 are the defaults"),
        ("waad", {"window": 2.5}, r"options: window must be a whole number of at least 1, got 2.5; 10 is"),
        ("waad", {"window": True}, r"options: window must be a whole number of at least 1, got True; 10 is"),
        ("coupled", {"back": 1.5}, r"options: back must be a number in \[0, 1\], got 1.5; 0.5 is the default"),
        ("coupled", {"share": float("nan")}, r"options: share must be a number in \[0, 1\], got nan; 0.4 is"),
        ("atpo", {"floor": "half"}, r"options: floor must be a number in \[0, 1\], got 'half'; 0.5 is the default"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str):
    with pytest.raises(CreditError, match=message):
        score_tokens(find_rule(name), batch_of([random_case(61)], **options))


def test_dense_rows_are_refused_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch):
    batch = batch_of([random_case(62)])

    def full(*_: object) -> None:
        raise MemoryLimitError("dense rows of 1 x 21 tokens: must fit")

    monkeypatch.setattr("flowgraph.attention.attention_rows.require_memory", full)
    with pytest.raises(MemoryLimitError, match="dense rows"):
        score_tokens(find_rule("shuffled_flow"), batch)
    for name in BUILT_IN:
        if not name.startswith("shuffled_flow"):
            score_tokens(find_rule(name), batch)  # all others read blocks

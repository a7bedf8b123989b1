"""Losses token by token against plain loops, their gradients, and sums over micro-batches against the whole batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rl import ConfigError, aggregate, kl_estimate, kl_loss, policy_loss, token_logprobs, value_loss
from tests.reference import rl_math as reference

some = settings(max_examples=60, deadline=None)
number = st.floats(-8, 8, width=32)
far = st.one_of(number, st.floats(-60, 60, width=32))
KINDS = ("token_mean", "seq_mean", "dr_grpo")


def mask_of(lengths: list[int], columns: int) -> Tensor:
    return torch.arange(columns)[None, :] < torch.tensor(lengths)[:, None]


def floats(size: int, values: st.SearchStrategy[float] = number) -> st.SearchStrategy[list[float]]:
    return st.lists(values, min_size=size, max_size=size)


# Log-probabilities --------------------------------------------------------------------------------------


@given(data=st.data(), temperature=st.sampled_from([0.3, 1.0, 2.5]))
@some
def test_logprobs_and_entropy_equal_their_definitions(data: st.DataObject, temperature: float):
    logits = [[data.draw(floats(5, far)) for _ in range(3)] for _ in range(2)]
    tokens = [data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=3)) for _ in range(2)]
    logprobs, entropy = token_logprobs(torch.tensor(logits), torch.tensor(tokens), temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    for b in range(2):
        for t in range(3):
            expected = reference.token_logprob(logits[b][t], tokens[b][t], temperature)
            assert_close(logprobs[b, t].item(), expected[0], rtol=1e-5, atol=1e-5)
            assert_close(entropy[b, t].item(), expected[1], rtol=1e-4, atol=1e-5)


def test_half_precision_is_computed_in_float32():
    logits, tokens = torch.randn(2, 3, 50).bfloat16(), torch.randint(50, (2, 3))
    halves, wholes = token_logprobs(logits, tokens, 0.7), token_logprobs(logits.float(), tokens, 0.7)
    for half, whole in zip(halves, wholes, strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(half, whole)


def test_gradients_of_logprobs_and_entropy():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), torch.randint(4, (2, 3))
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, tokens, 0.7), (logits,))
    for part in (0, 1):  # either result alone

        def one(z: Tensor, part: int = part) -> Tensor:
            return token_logprobs(z, tokens, 0.7)[part]

        assert torch.autograd.gradcheck(one, (logits,))


def test_gradient_in_half_precision_has_the_dtype_of_the_logits():
    logits = torch.randn(1, 2, 6, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.tensor([[1, 5]])
    token_logprobs(logits, tokens, 1.0)[0].sum().backward()
    expected = torch.nn.functional.one_hot(tokens, 6) - logits.detach().float().softmax(-1)
    assert logits.grad is not None
    assert torch.equal(logits.grad, expected.bfloat16())


def test_nothing_the_size_of_the_logits_is_kept_but_the_logits():
    logits, tokens = torch.randn(4, 5, 1000, requires_grad=True), torch.randint(1000, (4, 5))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_logprobs(logits, tokens, 1.0)
    assert logits.data_ptr() in [x.data_ptr() for x in kept]
    assert sum(x.numel() for x in kept if x.data_ptr() != logits.data_ptr()) <= 3 * tokens.numel()


def test_entries_ruled_out_have_no_probability_and_no_gradient():
    logits = torch.tensor([[[0.0, -math.inf, math.log(3.0)]]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([[2]]), 1.0)
    assert_close(logprobs.item(), math.log(0.75))
    assert_close(entropy.item(), -0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    (logprobs + entropy).sum().backward()
    slope = 0.75 * 0.25 * math.log(3)  # of the entropy of two outcomes, by the log-odds: -p (1 - p) log-odds
    assert logits.grad is not None
    assert_close(logits.grad[0, 0], torch.tensor([-0.25 + slope, 0.0, 0.25 - slope]))


def test_garbage_on_padding_reaches_neither_loss_nor_logits():
    torch.manual_seed(1)
    mask, tokens = mask_of([2, 3, 0], 4), torch.randint(7, (3, 4))
    clean = torch.randn(3, 4, 7)
    old, advantages, weights = torch.randn(3, 4) - 2, torch.randn(3, 4), torch.rand(3, 4)
    results = []
    for filler in (0.0, math.nan, math.inf):
        logits = clean.masked_fill(~mask[..., None], filler).requires_grad_()
        logprobs, entropy = token_logprobs(logits, tokens, 0.9)
        logprobs = torch.where(mask, logprobs, 0.0)
        loss = policy_loss(logprobs, old * mask, advantages * mask, clip=0.2, weights=weights.masked_fill(~mask, 1.0))
        total = aggregate(
            loss.per_token - 0.1 * entropy, mask, "token_mean", num_tokens=5, num_sequences=3, max_tokens=4
        )
        total.backward()
        assert logits.grad is not None
        assert bool((logits.grad[~mask] == 0).all())
        results.append((total.detach(), logits.grad))
    for total, gradient in results[1:]:
        assert torch.equal(total, results[0][0])
        assert torch.equal(gradient, results[0][1])
    assert results[0][1].abs().sum() > 0


# KL -----------------------------------------------------------------------------------------------------


@given(ours=floats(6, far), theirs=floats(6, far), kind=st.sampled_from(["k1", "k2", "k3"]))
@some
def test_kl_estimates_equal_their_definitions(ours: list[float], theirs: list[float], kind: str):
    got = kl_estimate(torch.tensor([ours]), torch.tensor([theirs]), kind)
    expected = [reference.kl_estimate(a, b, kind) for a, b in zip(ours, theirs, strict=True)]
    assert_close(got, torch.tensor([expected]), rtol=1e-4, atol=1e-5)
    assert bool(kl_estimate(torch.tensor([ours]), torch.tensor([ours]), kind).eq(0).all())


# One distribution over a small vocabulary, so that every expectation is a sum over all of its tokens.
def distributions(seed: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the policy, and log-probabilities of old policy and reference, over seven tokens."""
    random = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(7, generator=random, dtype=torch.float64)

    logits = (spread * normal()).requires_grad_()
    old = (logits.detach() + 0.5 * normal()).log_softmax(0)
    ref = (logits.detach() + spread * normal()).log_softmax(0)
    return logits, old, ref


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_the_expected_gradient_of_the_kl_loss_is_that_of_the_kl(kind: str, on_policy: bool, spread: float):
    """OpenRLHF PR#1309, trl PR#6503: exactly, over all tokens of a vocabulary, also when the old policy drew them."""
    for seed in range(5):
        logits, old, ref = distributions(seed, spread)
        policy = logits.log_softmax(0)
        if on_policy:
            old = policy.detach()
        (wanted,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits, retain_graph=True)
        loss = kl_loss(policy[None], old[None], ref[None], kind)
        (got,) = torch.autograd.grad((old.exp() * loss[0]).sum(), logits, retain_graph=True)
        assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_the_expected_value_of_the_kl_loss_k3_is_the_kl():
    logits, old, ref = distributions(0, 1.0)
    policy = logits.detach().log_softmax(0)
    exact = (policy.exp() * (policy - ref)).sum()
    assert_close((old.exp() * kl_loss(policy[None], old[None], ref[None], "k3")[0]).sum(), exact)


def test_a_bare_k3_has_the_gradient_of_the_other_kl():
    """What the correction is for: the gradient of KL(reference, policy) points elsewhere, and without bound."""
    cosines = []
    for seed in range(20):
        logits, _, ref = distributions(seed, 3.0)
        policy = logits.log_softmax(0)
        (wanted,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits, retain_graph=True)
        (forward,) = torch.autograd.grad((ref.exp() * (ref - policy)).sum(), logits, retain_graph=True)
        bare = (policy.detach().exp() * kl_estimate(policy[None], ref[None], "k3")[0]).sum()
        (got,) = torch.autograd.grad(bare, logits)
        assert_close(got, forward)
        cosines.append(float(torch.cosine_similarity(got, wanted, 0)))
    assert min(cosines) < 0.7


def test_the_kl_loss_pulls_back_however_far_the_policy_has_gone():
    """Beyond the clamp the value stops to grow; the force must not vanish there."""
    for distance in (-300.0, -25.0, 25.0, 300.0):
        logprobs = torch.tensor([[-1.0 + distance]], requires_grad=True)
        loss = kl_loss(logprobs, logprobs.detach(), torch.tensor([[-1.0]]))
        loss.sum().backward()
        assert logprobs.grad is not None
        assert_close(logprobs.grad.item(), distance, rtol=1e-5, atol=0)
        assert bool(loss.isfinite().all())


def test_k1_and_k3_average_to_the_kl_and_k2_has_its_gradient():
    logits = torch.tensor([0.3, -1.0, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
    policy, ref = logits.log_softmax(0)[None], torch.tensor([[-1.0, -0.5, 0.2, 0.4]]).double().log_softmax(1)
    exact = (policy.exp() * (policy - ref)).sum()
    for kind in ("k1", "k3"):
        assert_close((policy.exp() * kl_estimate(policy, ref, kind)).sum(), exact)
    chances = policy.detach().exp()  # tokens are drawn: the gradient goes through the estimate alone
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (got,) = torch.autograd.grad((chances * kl_estimate(policy, ref, "k2")).sum(), logits)
    assert_close(got, wanted)


# Policy loss --------------------------------------------------------------------------------------------


@given(
    data=st.data(),
    clip=st.sampled_from([0.1, 0.2, 1.5]),
    high=st.sampled_from([None, 0.28]),
    dual=st.sampled_from([None, 1.5, 3.0]),
)
@some
def test_policy_loss_and_its_gradient_equal_their_definitions(
    data: st.DataObject, clip: float, high: float | None, dual: float | None
):
    near = st.floats(-0.5, 0.5, width=32)
    steps = data.draw(floats(8, st.one_of(near, far)))
    old, advantages, weights = (data.draw(floats(8, st.floats(*ends, width=32))) for ends in ((-5, 0), (-2, 2), (0, 4)))
    logprobs = (torch.tensor([old]) + torch.tensor([steps])).requires_grad_()
    loss = policy_loss(
        logprobs, torch.tensor([old]), torch.tensor([advantages]),
        clip=clip, clip_high=high, dual_clip=dual, weights=torch.tensor([weights]),
    )  # fmt: skip
    loss.per_token.sum().backward()
    assert logprobs.grad is not None
    assert not loss.ratio.requires_grad
    for t in range(8):
        new, upper = logprobs[0, t].item(), clip if high is None else high
        ratio = math.exp(max(-20.0, min(20.0, new - old[t])))
        if any(abs(ratio - edge) < 1e-5 for edge in (1 - clip, 1 + upper, dual or 0.0)):
            continue  # rounding may fall on either side of an edge
        value, slope, clipped = reference.policy_loss(new, old[t], advantages[t], clip, upper, dual, weights[t])
        assert_close(loss.ratio[0, t].item(), ratio, rtol=1e-4, atol=0)
        assert_close(loss.per_token[0, t].item(), value, rtol=1e-4, atol=1e-6)
        if abs(abs(new - old[t]) - 20) > 1e-4:
            assert_close(logprobs.grad[0, t].item(), slope, rtol=1e-4, atol=1e-6)
        assert bool(loss.clipped[0, t]) is clipped or abs(advantages[t]) < 1e-30


def test_policy_loss_worked_by_hand():
    """Ratios 1.5, 1.5, 0.5, 0.5 under advantages 1, -1, 1, -1 with clip 0.2."""
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5]])
    logprobs, advantages = ratio.log().requires_grad_(), torch.tensor([[1.0, -1, 1, -1]])
    loss = policy_loss(logprobs, torch.zeros(1, 4), advantages, clip=0.2)
    assert_close(loss.per_token, torch.tensor([[-1.2, 1.5, -0.5, 0.8]]))
    assert loss.clipped.tolist() == [[True, False, False, True]]
    loss.per_token.sum().backward()
    assert logprobs.grad is not None
    assert_close(logprobs.grad, torch.tensor([[0.0, 1.5, -0.5, 0.0]]))
    higher = policy_loss(logprobs, torch.zeros(1, 4), advantages, clip=0.2, clip_high=0.4)
    assert_close(higher.per_token, torch.tensor([[-1.4, 1.5, -0.5, 0.8]]))
    dual = policy_loss(logprobs, torch.zeros(1, 4), advantages, clip=0.2, dual_clip=1.25)
    assert_close(dual.per_token, torch.tensor([[-1.2, 1.25, -0.5, 0.8]]))
    assert dual.clipped.tolist() == [[True, True, False, True]]


def test_weight_one_is_the_plain_loss_to_the_last_bit_and_no_weight_changes_who_is_clipped():
    torch.manual_seed(2)
    old, advantages = torch.randn(5, 9), torch.randn(5, 9)
    start = old + 0.4 * torch.randn(5, 9)
    results = []
    for weights in (None, torch.ones(5, 9), torch.full((5, 9), 2.0, requires_grad=True)):
        logprobs = start.clone().requires_grad_()
        loss = policy_loss(logprobs, old, advantages, clip=0.2, dual_clip=1.3, weights=weights)
        loss.per_token.sum().backward()
        results.append((loss, logprobs.grad))
        assert weights is None or weights.grad is None
    (plain, gradient), (ones, gradient_of_ones), (twice, gradient_of_twice) = results
    assert torch.equal(plain.per_token, ones.per_token)
    assert torch.equal(gradient, gradient_of_ones)
    assert torch.equal(2 * plain.per_token, twice.per_token)
    assert torch.equal(2 * gradient, gradient_of_twice)
    assert torch.equal(plain.clipped, twice.clipped)
    assert 0 < int(plain.clipped.sum()) < 45


def test_a_token_far_off_does_not_overflow():
    logprobs = torch.tensor([[0.0, -500.0, -math.inf]], requires_grad=True)
    loss = policy_loss(logprobs, torch.tensor([[-500.0, 0.0, -1.0]]), -torch.ones(1, 3), clip=0.2)
    assert_close(loss.per_token, torch.tensor([[math.exp(20), 0.8, 0.8]]))
    loss.per_token.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.0, 0.0, 0.0]]


# Value loss ---------------------------------------------------------------------------------------------


@given(values=floats(6), old=floats(6), returns=floats(6), clip=st.sampled_from([None, 0.2, 3.0]))
@some
def test_value_loss_equals_its_definition(
    values: list[float], old: list[float], returns: list[float], clip: float | None
):
    got = value_loss(torch.tensor([values]), torch.tensor([old]), torch.tensor([returns]), clip=clip)
    expected = [reference.value_loss(*three, clip) for three in zip(values, old, returns, strict=True)]
    assert_close(got, torch.tensor([expected]), rtol=1e-5, atol=1e-5)


def test_value_loss_stops_where_it_went_far_towards_the_target_and_only_there():
    """From 0 with clip 0.2: 0.5 towards 1 is held at 0.2, 0.5 away from -1 is pulled back, 0.1 is free."""
    values = torch.tensor([[0.5, 0.5, 0.1]], requires_grad=True)
    loss = value_loss(values, torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 1.0]]), clip=0.2)
    assert_close(loss, torch.tensor([[0.32, 1.125, 0.405]]))
    loss.sum().backward()
    assert values.grad is not None
    assert_close(values.grad, torch.tensor([[0.0, 1.5, -0.9]]))


# Aggregation --------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), kind=st.sampled_from(KINDS), data=st.data())
@some
def test_micro_batches_sum_to_the_whole_batch(lengths: list[int], kind: str, data: st.DataObject):
    rows = [data.draw(floats(n)) for n in lengths]
    filler = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e38]))
    per_token = torch.tensor([row + [filler] * (6 - len(row)) for row in rows], requires_grad=True)
    mask = mask_of(lengths, 6)
    counts = {"num_tokens": sum(lengths), "num_sequences": len(lengths), "max_tokens": 6}
    whole = aggregate(per_token, mask, kind, **counts)
    assert whole.dtype == torch.float32
    assert_close(whole.item(), reference.aggregate(rows, kind, **counts), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(whole, per_token)
    assert bool((gradient[~mask] == 0).all())
    size = data.draw(st.integers(1, len(lengths)))
    pieces = [
        aggregate(per_token[k : k + size], mask[k : k + size], kind, **counts) for k in range(0, len(lengths), size)
    ]
    assert_close(torch.stack(pieces).sum(), whole, rtol=1e-5, atol=1e-6)
    (in_pieces,) = torch.autograd.grad(torch.stack(pieces).sum(), per_token)
    assert torch.equal(in_pieces, gradient)


def test_aggregation_worked_by_hand():
    per_token, mask = torch.tensor([[1.0, 2, 6], [4.0, 9, 9]]), mask_of([3, 1], 3)
    counts = {"num_tokens": 4, "num_sequences": 2, "max_tokens": 10}
    results = [aggregate(per_token, mask, kind, **counts).item() for kind in KINDS]
    assert_close(results, [13 / 4, (3 + 4) / 2, 13 / 20])


@pytest.mark.parametrize("kind", KINDS)
def test_a_count_of_zero_gives_zero_and_a_gradient_of_zero(kind: str):
    per_token = torch.full((2, 3), math.nan, requires_grad=True)
    for mask in (torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)):
        total = aggregate(per_token, mask, kind, num_tokens=0, num_sequences=0, max_tokens=5)
        assert total.item() == 0
        (gradient,) = torch.autograd.grad(total, per_token)
        assert bool((gradient == 0).all())


@pytest.mark.unchecked
def test_bad_input():
    flat, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    logits, tokens = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    counts = {"num_tokens": 6, "num_sequences": 2, "max_tokens": 3}
    for call, text in (
        (lambda: token_logprobs(logits, tokens, 0.0), r"temperature: must be finite and above 0, got 0.0; use the"),
        (lambda: token_logprobs(logits, tokens, math.nan), r"temperature: must be finite and above 0, got nan; "),
        (lambda: token_logprobs(logits, tokens + 4, 1.0), r"tokens: must lie in the vocabulary of 4, got 4 to 4; put"),
        (lambda: token_logprobs(logits, tokens - 1, 1.0), r"tokens: must lie in the vocabulary of 4, got -1 to -1; "),
        (lambda: token_logprobs(logits, tokens.int(), 1.0), r"tokens: must be an int64 tensor .*got torch.int32"),
        (lambda: token_logprobs(logits, [[0]], 1.0), r"tokens: must be an int64 tensor .*got list; convert"),
        (lambda: token_logprobs(logits[:1], tokens, 1.0), r"logits: must be a float tensor of shape \(2, 3, 4\), got"),
        (lambda: token_logprobs(flat, tokens, 1.0), r"logits: must be a float tensor of shape \(2, 3, 3\), got"),
        (lambda: kl_loss(flat, flat, flat, "k1"), r"kind: must be one of 'k3', 'k2', got 'k1'; choose one of them"),
        (lambda: kl_loss(flat, flat, flat[:1]), "ref_logprobs"),
        (lambda: kl_estimate(flat, flat, "k4"), r"kind: must be one of 'k1', 'k2', 'k3', got 'k4'; choose one of them"),
        (lambda: kl_estimate(flat, flat[0], "k1"), r"ref_logprobs: must be a float tensor of shape \(2, 3\), got"),
        (lambda: kl_estimate([0.0], [0.0], "k1"), r"logprobs: must be a float tensor of shape \(\), got list"),
        (lambda: policy_loss(flat, flat[:1], flat, clip=0.2), r"old_logprobs: must be a float tensor .*got"),
        (lambda: policy_loss(flat, flat, flat[:, :1], clip=0.2), r"advantages: must be a float tensor .*got"),
        (lambda: policy_loss(flat, flat, flat, clip=0.2, weights=flat[0]), r"weights: must be a float tensor .*got"),
        (lambda: policy_loss(flat, flat, flat, clip=0.0), r"clip: must be finite and above 0, got 0.0; 0.2 is the"),
        (lambda: policy_loss(flat, flat, flat, clip=0.2, clip_high=-1.0), r"clip_high: must be .*got -1.0; 0.28"),
        (lambda: policy_loss(flat, flat, flat, clip=0.2, dual_clip=1.0), r"dual_clip: must be .*above 1, got 1.0; 3"),
        (lambda: value_loss(flat, flat, flat[:1]), r"returns: must be a float tensor of shape \(2, 3\), got"),
        (lambda: value_loss(flat, flat, flat, clip=0.0), r"clip: must be finite and above 0, got 0.0; 0.2"),
        (lambda: aggregate(flat, mask[:1], "seq_mean", **counts), r"per_token: must be a float .*\(1, 3\), got"),
        (lambda: aggregate(flat, flat, "seq_mean", **counts), r"mask: must be a bool tensor .*got torch.float32"),
        (lambda: aggregate(flat, mask, "mean", **counts), r"kind: must be one of 'token_mean', .*got 'mean'; choose"),
        (lambda: aggregate(flat, mask, "seq_mean", **counts | {"num_tokens": -1}), r"num_tokens: must be at least 0"),
        (lambda: aggregate(flat, mask, "seq_mean", **counts | {"max_tokens": math.nan}), r"max_tokens: .*got nan; "),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            call()

"""The report shows what the rollout holds; tokens are data; a rollout file comes back as it was or not at all."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowgraph import InvalidInputError, OutputError
from rl.records import Credit, Experience, Responses, Sample, TokenScores
from rl.reports.credit_report import render_report, report_payload, write_report
from tests.fixtures.browser import (
    assert_nothing_is_loaded_or_written_as_markup,
    assert_policy_names_the_inline_code,
    browser,  # noqa: F401
    contrasts,
    is_dark,
    open_file,  # noqa: F401
    token_of,
)

HOSTILE = [
    "</script><img src=x onerror=window.hacked=1>",
    "<!--<script>",
    "&lt;img src=x onerror=window.hacked=1&gt;",
    "\u2028window.hacked=1\u2029",
    "\x00\x07\x1b[31m\x7f",
    "\ud83d",
    "\u202eevil\u2066",
    "{{ 7 * 7 }}{% raw %}",
    '" onfocus="window.hacked=1',
    "",
]
TEXT = "First , add 3 and 14 : 3 + 14 = 17 . Then 17 * 2 = 34 , so the\n answer is 34 . Done"


def example(
    groups: int = 4, size: int = 4, width: int = 30, texts: list[str] | None = None, extras: bool = True
) -> tuple[Experience, list[list[str]], torch.Tensor]:
    """A plausible rollout: top 40 % by score times 1.5, two answer tokens at the end, padding of random length."""
    random = torch.Generator().manual_seed(3)
    batch, prompt = groups * size, 6

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape or (batch, width), generator=random)

    column = torch.arange(width)
    lengths = (width - (draw(batch) * width / 3).long()).clamp(min=3)
    response_mask = column < lengths[:, None]
    answer = (column >= lengths[:, None] - 2) & response_mask
    answer[0] = False  # one response never states an answer
    scored = response_mask & ~answer
    scores = torch.where(scored, draw() ** 4 * 0.3, 0.0)
    rank = scores.masked_fill(~scored, -1).argsort(1, descending=True).argsort(1)
    weights = torch.where(scored & (rank < 0.4 * scored.sum(1, keepdim=True)), 1.5, 1.0)
    rewards = (draw(batch) < 0.5).float()
    rewards[:size] = 0  # the first prompt is never solved
    if groups > 1:
        rewards[size : 2 * size] = torch.arange(size) % 2
    advantages = torch.where(response_mask, rewards[:, None] - 0.45 + 0.2 * (draw() - 0.5), 0.0)
    logprobs = torch.where(response_mask, (draw() ** 3 + 1e-4).log() / 3, 0.0)
    pad = torch.zeros(batch, prompt, dtype=torch.bool)
    oracle = scored & (draw() < 0.05) if extras else None
    samples = tuple(
        Sample(number, f"Use the numbers {number}, 3 and 14 to make {40 + number}.\nThink first.", str(40 + number))
        for number in range(groups)
        for _ in range(size)
    )
    experience = Experience(
        responses=Responses(
            samples=samples,
            completions=tuple(f"completion {row}" for row in range(batch)),
            input_ids=torch.arange(batch * (prompt + width)).view(batch, -1),
            attention_mask=torch.cat([~pad, response_mask], 1),
            prompt_length=prompt,
            response_mask=response_mask,
            truncated=lengths == width,
            groups=torch.arange(groups).repeat_interleave(size),
            rewards=rewards,
            question=torch.cat([~pad, torch.zeros_like(response_mask)], 1),
            answer=torch.cat([pad, answer], 1),
            oracle=oracle,
            detours=None if oracle is None else scored & ~oracle & (column % 5 == 2),
        ),
        scores=TokenScores(
            logprobs=logprobs,
            entropy=torch.where(response_mask, draw() ** 3 * 2.5, 0.0),
            ref_logprobs=logprobs + 0.1 * (draw() - 0.5) if extras else None,
            values=draw() if extras else None,
        ),
        credit=Credit(scores=scores, scored=scored, weights=weights),
        advantages=advantages,
        returns=draw() if extras else None,
        loss_mask=response_mask & (lengths < width)[:, None],
        policy_weights=weights.clone(),
    )
    texts = texts or [(" " if i else "") + word for i, word in enumerate(TEXT.split(" "))]
    tokens = [[texts[i % len(texts)] for i in range(width)] for _ in range(batch)]
    return experience, tokens, (0.3 * (draw() - 0.5)).exp()


def data_of(page: str) -> dict:
    found = re.findall(r'<script type="application/json" id="rollout">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def names_of(payload: dict) -> list[str]:
    return [quantity["name"] for quantity in payload["quantities"]]


def response_of(payload: dict, row: int) -> dict:
    return next(r for group in payload["groups"] for r in group["responses"] if r["row"] == row)


# --- what the page holds --------------------------------------------------------------------------------------


def test_every_number_of_every_token_is_the_rollouts():
    experience, tokens, ratio = example()
    payload = report_payload(experience, tokens, ratio=ratio)
    assert names_of(payload) == [
        "weight", "score", "advantage", "advantage × weight", "ratio", "entropy", "log-probability",
        "KL to the reference", "value", "return",
    ]  # fmt: skip
    assert experience.scores.ref_logprobs is not None
    kl = experience.scores.logprobs - experience.scores.ref_logprobs
    update = experience.advantages * experience.policy_weights
    expected = [
        experience.credit.weights, experience.credit.scores, experience.advantages, update, ratio,
        experience.scores.entropy, experience.scores.logprobs, kl, experience.scores.values, experience.returns,
    ]  # fmt: skip
    mask, scored = experience.responses.response_mask, experience.credit.scored
    for row in range(16):
        shown = response_of(payload, row)
        length = int(mask[row].sum())
        assert shown["tokens"] == tokens[row][:length]
        assert shown["padding"] == 30 - length
        for index, (values, column) in enumerate(zip(expected, shown["numbers"], strict=True)):
            for position in range(length):
                if index < 2 and not scored[row, position]:
                    assert column[position] is None
                else:
                    assert column[position] == pytest.approx(float(values[row, position]), rel=1e-3, abs=1e-9)


def test_flags_say_chosen_scored_answer_loss_decisive_and_detour():
    experience, tokens, _ = example()
    payload = report_payload(experience, tokens)
    masks = [
        experience.responses.response_mask, experience.credit.scored, experience.responses.answer_in_response,
        experience.loss_mask, experience.responses.oracle, experience.responses.detours,
    ]  # fmt: skip
    for row in range(16):
        shown = response_of(payload, row)
        for position, flags in enumerate(shown["flags"]):
            assert [bool(flags & 1 << bit) for bit in range(6)] == [bool(mask[row, position]) for mask in masks]
        assert shown["in_loss"] == (not shown["truncated"])


def test_numbers_that_a_run_does_not_have_are_not_offered():
    experience, tokens, _ = example(extras=False)
    payload = report_payload(experience, tokens)
    assert names_of(payload) == ["weight", "score", "advantage", "advantage × weight", "entropy", "log-probability"]
    assert max(max(r["flags"]) for group in payload["groups"] for r in group["responses"]) < 16


def test_weights_of_the_loss_are_shown_apart_where_they_differ():
    experience, tokens, _ = example()
    ones = replace(experience, policy_weights=torch.ones_like(experience.policy_weights))
    payload = report_payload(ones, tokens)
    index = names_of(payload).index("loss weight")
    assert set(response_of(payload, 0)["numbers"][index]) == {1}
    update = response_of(payload, 0)["numbers"][names_of(payload).index("advantage × weight")]
    assert update == response_of(payload, 0)["numbers"][names_of(payload).index("advantage")]


def test_the_summary_is_counted():
    experience, tokens, _ = example()
    summary = report_payload(experience, tokens)["summary"]
    rewards, weights = experience.responses.rewards.view(4, 4).tolist(), experience.credit.weights
    scored = experience.credit.scored
    chosen = [float(weight) for weight in weights[scored]]
    assert summary["reward"] == pytest.approx(sum(map(sum, rewards)) / 16, rel=1e-3)
    assert summary["without_variance"] == sum(len(set(group)) == 1 for group in rewards) / 4
    assert summary["without_variance"] > 0
    assert summary["weight"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-3)
    assert summary["selected"] == pytest.approx(chosen.count(1.5) / len(chosen), rel=1e-3)
    assert summary["loss_weight"] == pytest.approx(float(weights[experience.loss_mask].mean()), rel=1e-3)
    counts = summary["histogram"]["counts"]
    assert [summary["histogram"]["low"], summary["histogram"]["high"]] == [0, 1.5]
    assert counts[-1] == chosen.count(1.5)
    assert counts[20] == chosen.count(1.0)
    assert sum(counts) == len(chosen) == summary["num_scored"]


def test_equal_weights_select_no_token():
    experience, tokens, _ = example()
    same = replace(experience.credit, weights=torch.full_like(experience.credit.weights, 0.1))
    assert report_payload(replace(experience, credit=same), tokens)["summary"]["selected"] == 0


def test_responses_are_grouped_by_prompt_the_right_ones_first():
    experience, tokens, _ = example()
    payload = report_payload(experience, tokens)
    assert [group["group"] for group in payload["groups"]] == [0, 1, 2, 3]
    assert [r["right"] for r in payload["groups"][1]["responses"]] == [True, True, False, False]
    assert [r["row"] for r in payload["groups"][1]["responses"]] == [5, 7, 4, 6]
    assert [group["same_reward"] for group in payload["groups"][:2]] == [True, False]
    assert payload["groups"][2]["answer"] == "42"
    assert payload["groups"][2]["prompt"] == [["", "Use the numbers 2, 3 and 14 to make 42.\nThink first."]]
    lenient = report_payload(experience, tokens, right_at=0.0)
    assert all(r["right"] for group in lenient["groups"] for r in group["responses"])


def test_chosen_groups_are_shown_and_summarised_alone():
    experience, tokens, ratio = example()
    payload = report_payload(experience, tokens, ratio=ratio, groups=[1])
    assert [group["group"] for group in payload["groups"]] == [1]
    assert payload["summary"]["num_responses"] == 4
    whole = response_of(report_payload(experience, tokens, ratio=ratio, groups=[1, 0]), 5)
    assert response_of(payload, 1)["numbers"] == whole["numbers"]


def test_full_colour_starts_at_the_99th_percentile():
    experience, tokens, _ = example()
    entropy = torch.where(experience.responses.response_mask, 1.0, 0.0)
    entropy[0, 0] = 1000.0
    scores = replace(experience.scores, entropy=entropy)
    payload = report_payload(replace(experience, scores=scores), tokens)
    scale = payload["quantities"][names_of(payload).index("entropy")]
    assert (scale["bound"], scale["exceeded"]) == (1, [False, True])
    weight = payload["quantities"][0]
    assert (weight["centre"], weight["bound"], weight["exceeded"]) == (1, 0.5, [False, False])


def test_chat_prompts_and_strange_numbers_are_shown():
    experience, tokens, ratio = example()
    messages = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "2 + 2?"}]
    samples = tuple(Sample(0, messages, "4") for _ in experience.responses.samples)
    advantages = experience.advantages.clone()
    advantages[0, 0], advantages[0, 1], advantages[0, 2] = math.nan, math.inf, 1e30
    ratio[0, 0] = 0.0
    odd = replace(experience, responses=replace(experience.responses, samples=samples), advantages=advantages)
    payload = report_payload(odd, tokens, ratio=ratio)
    assert payload["groups"][0]["prompt"] == [["system", "Be <b>brief</b>."], ["user", "2 + 2?"]]
    assert response_of(payload, 0)["numbers"][2][:3] == [None, None, pytest.approx(1e30)]
    assert "<b>" not in render_report(payload)


def test_nothing_scored_and_nothing_written_still_make_a_page():
    experience, tokens, _ = example(1, 2, 5)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    empty = replace(
        experience,
        responses=replace(experience.responses, response_mask=nothing),
        credit=replace(experience.credit, scored=nothing),
        loss_mask=nothing,
    )
    payload = report_payload(empty, tokens)
    assert payload["summary"]["weight"] is None
    assert payload["summary"]["selected"] is None
    assert [(r["tokens"], r["padding"]) for r in payload["groups"][0]["responses"]] == [([], 5), ([], 5)]
    assert "<dd>–</dd>" in render_report(payload)


def test_wrong_arguments_are_named():
    experience, tokens, ratio = example()
    with pytest.raises(InvalidInputError, match=r"tokens: must be 16 lists of 30 strings.*got 15 lists of \[30\]"):
        report_payload(experience, tokens[1:])
    with pytest.raises(InvalidInputError, match=r"got 16 lists of \[29, 30\]; pass token_texts"):
        report_payload(experience, [tokens[0][1:], *tokens[1:]])
    with pytest.raises(InvalidInputError, match=r"ratio: must have shape \(16, 30\), got \(16, 29\); give one"):
        report_payload(experience, tokens, ratio=ratio[:, 1:])
    with pytest.raises(InvalidInputError, match=r"groups: must name groups .* got \[9\]; there are \[0, 1, 2, 3\]"):
        report_payload(experience, tokens, groups=[9])
    with pytest.raises(InvalidInputError, match="groups: must name groups"):
        report_payload(experience, tokens, groups=[])


# --- the page as a file ---------------------------------------------------------------------------------------


@pytest.fixture
def hostile() -> dict:
    experience, tokens, ratio = example(1, 2, 12, HOSTILE)
    sample = Sample(0, HOSTILE[0] + HOSTILE[6], HOSTILE[1] + HOSTILE[4])
    experience = replace(experience, responses=replace(experience.responses, samples=(sample, sample)))
    settings = {HOSTILE[0]: [HOSTILE[1], 2], "nested": {"x": HOSTILE[8], "none": None}}
    return report_payload(
        experience, tokens, ratio=ratio, title=HOSTILE[0] + "\u202e\x00", subtitle=HOSTILE[5], settings=settings
    )


def test_token_text_arrives_unchanged_and_cannot_leave_its_element(hostile: dict):
    page = render_report(hostile)
    texts = data_of(page)["groups"][0]["responses"][0]["tokens"]
    assert texts == [HOSTILE[i % len(HOSTILE)] for i in range(len(texts))]
    assert len(texts) >= 8
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert "<!--" not in page
    raw = re.search(r'id="rollout">(.*?)</script>', page, re.DOTALL)
    assert raw is not None
    assert raw[1].isascii()
    assert not set(raw[1]) & set("<>&\u2028\u2029\x00\x1b")


def test_text_outside_the_data_is_escaped_and_visible(hostile: dict):
    page = render_report(hostile)
    assert "<h1>&lt;/script&gt;&lt;img src=x onerror=window.hacked=1&gt;⟨U+202E⟩␀</h1>" in page
    assert '<p class="subtitle">⟨U+D83D⟩</p>' in page
    assert "<dt>&lt;/script&gt;&lt;img src=x onerror=window.hacked=1&gt;</dt><dd>&lt;!--&lt;script&gt;, 2</dd>" in page
    assert "<dt>nested.x</dt><dd>&#34; onfocus=&#34;window.hacked=1</dd>" in page
    assert "<dt>nested.none</dt><dd>none</dd>" in page
    assert "\u202e" not in page


def test_the_policy_names_exactly_the_inline_code(hostile: dict):
    assert_policy_names_the_inline_code(render_report(hostile))


def test_nothing_is_loaded_and_nothing_is_written_as_markup():
    experience, tokens, _ = example()
    assert_nothing_is_loaded_or_written_as_markup(render_report(report_payload(experience, tokens)))


def test_the_header_says_what_the_summary_says():
    experience, tokens, _ = example()
    payload = report_payload(experience, tokens, title="Step 40", settings={"credit": {"rule": "flow"}, "layers": [1]})
    summary = payload["summary"]
    page = render_report(payload)
    assert "<h1>Step 40</h1>" in page
    assert "subtitle" not in page.split("</style>")[1].split("<script")[0]
    assert f"<dd>{summary['reward']:.3g}</dd>" in page
    assert f"<dd>{100 * summary['selected']:.0f} %</dd>" in page
    assert f"mean; {summary['num_scored']} scored of {summary['num_tokens']}" in page
    assert "<dt>credit.rule</dt><dd>flow</dd>" in page
    bars = re.findall(r"<rect [^>]*height=\"([\d.]+)\"><title>(\d+) tokens", page)
    counts = [count for count in summary["histogram"]["counts"] if count]
    assert [int(count) for _, count in bars] == counts
    assert [float(height) for height, _ in bars] == pytest.approx([44 * c / max(counts) for c in counts], abs=0.06)


def test_a_large_rollout_stays_under_two_megabytes(tmp_path: Path):
    experience, tokens, ratio = example(16, 4, 256)
    full = torch.ones_like(experience.responses.response_mask)
    experience = replace(
        experience,
        responses=replace(experience.responses, response_mask=full),
        credit=replace(experience.credit, weights=experience.credit.weights * 1.0371),
    )
    assert len(write_report(tmp_path / "page.html", experience, tokens, ratio=ratio).read_bytes()) < 2_000_000


def test_the_file_is_the_page(tmp_path: Path):
    experience, tokens, ratio = example(1, 2, 12, HOSTILE)
    path = write_report(tmp_path / "page.html", experience, tokens, ratio=ratio, title="A")
    assert path.read_bytes().decode() == render_report(report_payload(experience, tokens, ratio=ratio, title="A"))
    with pytest.raises(OutputError, match="must name a file"):
        write_report(tmp_path, experience, tokens)
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


# --- token strings --------------------------------------------------------------------------------------------


# --- in a browser ---------------------------------------------------------------------------------------------


@pytest.fixture
def visit(open_file, tmp_path: Path):  # noqa: F811
    """Open a rollout's page from disk."""

    def open_page(rollout: tuple, **options):
        experience, tokens, ratio = rollout
        return open_file(write_report(tmp_path / "page.html", experience, tokens, ratio=ratio), **options)

    return open_page


def readout_of(page) -> str:
    return page.locator("#readout").inner_text()


@pytest.mark.browser
def test_the_select_recolours_tokens_and_legend(visit):
    rollout = example()
    page = visit(rollout)
    scored = page.locator("main .t:not(.off)")
    assert scored.count() == int(rollout[0].credit.scored.sum())
    assert page.locator("main .t.off.plain").count() == page.locator("main .t.off").count() > 0
    assert "1.5" in page.locator("#legend").inner_text()
    before = scored.first.evaluate("token => getComputedStyle(token).backgroundColor")
    page.select_option("#quantity", label="advantage")
    assert page.locator("main .t.plain").count() == 0
    assert "before the weight" in page.locator("#legend").inner_text()
    assert scored.first.evaluate("token => getComputedStyle(token).backgroundColor") != before
    negative = int(((rollout[0].advantages < 0) & rollout[0].responses.response_mask).sum())
    assert page.locator("main .t.minus").count() == negative > 0
    style = page.locator("main .t.answer").first.evaluate("token => getComputedStyle(token).borderBottomStyle")
    assert style == "double"
    ramp = page.locator(".ramp i")
    ends = [ramp.nth(i).evaluate("step => getComputedStyle(step).backgroundColor") for i in (0, 24)]
    assert ends[0] != ends[1], "both ends of a signed scale have colours of their own"


@pytest.mark.browser
def test_decisive_tokens_and_detours_have_signs_and_a_legend(visit):
    rollout = example()
    page = visit(rollout)
    responses = rollout[0].responses
    for sign, word, mask in (("◆", "decisive", responses.oracle), ("◇", "detour", responses.detours)):
        assert f"{sign} {word}" in page.locator("#legend").inner_text()
        marked = page.locator("main .t .sign", has_text=sign)
        assert marked.count() == int((mask & responses.response_mask).sum()) > 0
        label = marked.first.locator("xpath=..").get_attribute("aria-label")
        assert f", {word}," in label


@pytest.mark.browser
def test_pointing_at_a_token_shows_every_number_and_a_click_pins_it(visit):
    experience, tokens, ratio = example()
    page = visit((experience, tokens, ratio))
    payload = report_payload(experience, tokens, ratio=ratio)
    first = payload["groups"][0]["responses"][0]
    token_of(page, 1).hover()
    shown = readout_of(page)
    assert f"token 2 of {len(first['tokens'])} · response {first['row']} (✗ wrong) · scored" in shown
    for name, column in zip(names_of(payload), first["numbers"], strict=True):
        found = re.search("^" + re.escape(name) + r"\n(\S+)", shown, re.MULTILINE)
        assert found is not None, name
        value = float(found[1].replace("−", "-"))
        assert value == pytest.approx(column[1], abs=6e-4), name
    token_of(page, 3).click()
    token_of(page, 5).hover()
    assert "token 4 of" in readout_of(page)
    assert token_of(page, 3).get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert "Point at a token" in readout_of(page)
    assert token_of(page, 3).get_attribute("aria-pressed") == "false"


@pytest.mark.browser
def test_the_keyboard_reaches_every_token(visit):
    page = visit(example())
    assert page.locator('main .t[tabindex="0"]').count() == 16
    page.locator("#quantity").focus()
    page.keyboard.press("Tab")
    assert "token 1 of" in readout_of(page)
    page.keyboard.press("ArrowRight")
    assert "token 2 of" in readout_of(page)
    page.keyboard.press("End")
    last = int(page.evaluate("document.activeElement.dataset.index"))
    assert f"token {last + 1} of {last + 1} " in readout_of(page)
    page.keyboard.press("ArrowRight")
    assert int(page.evaluate("document.activeElement.dataset.index")) == last
    page.keyboard.press("Enter")
    page.keyboard.press("Home")
    assert f"token {last + 1} of" in readout_of(page)
    assert page.locator('main .t[tabindex="0"]').count() == 16
    assert token_of(page, 0).get_attribute("aria-label").startswith("First, token 1, scored, not in the loss, weight 1")


@pytest.mark.browser
def test_right_wrong_cut_off_and_flat_groups_are_said_in_words(visit):
    experience, tokens, ratio = example()
    page = visit((experience, tokens, ratio))
    verdicts = page.locator(".verdict").all_inner_texts()
    assert verdicts.count("✓ right") == int(experience.responses.rewards.sum())
    assert len(verdicts) == 16
    assert page.get_by_text("✂ cut off").count() == int(experience.responses.truncated.sum()) > 0
    assert page.get_by_text("no variance").count() > 0
    assert page.locator("main .pad").count() == int((~experience.responses.response_mask).any(1).sum())
    assert page.get_by_text("Use the numbers 2, 3 and 14").count() == 1


@pytest.mark.browser
def test_the_table_holds_the_same_numbers(visit):
    experience, tokens, ratio = example()
    page = visit((experience, tokens, ratio))
    payload = report_payload(experience, tokens, ratio=ratio)
    assert page.locator("table").count() == 0
    page.locator(".response summary").nth(1).click()
    shown = payload["groups"][0]["responses"][1]
    rows = page.locator("tbody tr")
    assert rows.count() == len(shown["tokens"])
    cells = rows.nth(4).locator("td, th").all_inner_texts()
    assert cells[0] == "5"
    numbers = [None if cell == "–" else float(cell.replace("−", "-")) for cell in cells[2:-1]]
    assert numbers == [pytest.approx(column[4], abs=6e-4) for column in shown["numbers"]]
    assert page.locator("thead th").all_inner_texts()[2:-1] == names_of(payload)


@pytest.mark.browser
def test_hostile_tokens_are_shown_and_never_run(visit):
    page = visit(example(1, 1, len(HOSTILE) + 2, HOSTILE))
    shown = [text.strip() for text in page.locator("main .t").all_inner_texts()]
    for index in range(len(shown)):
        token_of(page, index).hover()
    page.locator(".response summary").click()
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    expected = [*HOSTILE[:3], "⟨U+2028⟩window.hacked=1⟨U+2029⟩", "␀␇␛[31m␡", "⟨U+D83D⟩", "⟨U+202E⟩evil⟨U+2066⟩"]
    assert [text.strip("◆◇") for text in shown[:7]] == expected


@pytest.mark.browser
def test_a_phone_needs_no_sideways_scrolling(visit):
    page = visit(example(), viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    token_of(page, 2).tap()
    assert "token 3 of" in readout_of(page)
    assert page.locator("#readout").bounding_box()["y"] < 800
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("side", ["", "plus", "minus"])
def test_every_token_is_readable_on_every_colour(visit, scheme: str, side: str):
    page = visit(example(1, 2, 6), color_scheme=scheme)
    assert is_dark(page) == (scheme == "dark")
    assert min(contrasts(page, "main .t", f"t {side}", 50)) >= 4.4

r"""Estimate the value of every prefix of a response by Monte Carlo, and the advantage of its tokens from them.

:math:`V(t)` is the expected reward when the policy goes on from the first t tokens of a response. K rollouts from
there estimate it. The advantage of the token at t is the difference that it makes, :math:`V(t + 1) - V(t)`, and the
value after the last token is the reward of the response itself. Over a response the advantages sum to the reward minus
:math:`V(0)`. Only the first :math:`T` values are estimated, in two halves of K / 2 rollouts, whose disagreement
measures the noise.

Source: Kazemnejad et al., VinePPO, arXiv 2410.01679, which estimates the values at the ends of steps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowgraph import OutputError, encode
from rl.config import PPOConfig
from rl.errors import ConfigError
from rl.policy.sampling import Ending, Generated, generate
from rl.records import Responses, Sample
from rl.rollouts.rollout import PromptEncoder, draw_samples, judge, sample_responses
from rl.seeds import derive
from rl.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = "flowgraph-rl.prefix-values/1"
STEP_END = r"\n+|[.!?;,](?=\s|$)"
"""Text that ends a step by default."""

Progress = Callable[[int, int], None]
"""Called with the problems that are done, and the problems to do."""


@dataclass(frozen=True)
class PrefixValues:
    """A response with the estimated values of its prefixes.

    Attributes:
        problem: number of the problem in the split ``"train"``.
        number: of the response among those to its problem.
        ids: token ids of the response, its end token included.
        truncated: whether the response was cut off.
        reward: its reward.
        prefixes: lengths in tokens of the prefixes that have a value: 0 first, the whole response last.
        first_half: value of each prefix from one half of the rollouts; the last is the reward.
        second_half: the same from the other half.
        start_value: a third estimate of the value of the prompt, from K rollouts of its own.
    """

    problem: int
    number: int
    ids: list[int]
    truncated: bool
    reward: float
    prefixes: list[int]
    first_half: list[float]
    second_half: list[float]
    start_value: float


@dataclass(frozen=True)
class Sampler:
    """Sample responses, and go on from their prefixes.

    Attributes:
        model: the policy.
        tokenizer: of the model.
        task: source of problems and rewards.
        config: lengths, temperature, ``group_size`` responses to a problem.
        num_rollouts: K, even.
        step_end: regular expression of the text that ends a step; None: every token is one.
        batch_size: rollouts at a time.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    config: PPOConfig
    num_rollouts: int
    step_end: str | None
    batch_size: int

    def encoder(self) -> PromptEncoder:
        """Make the encoder of the prompts."""
        config = self.config
        return PromptEncoder(
            self.tokenizer, self.model, config.max_prompt_tokens, config.max_response_tokens, config.stop_strings
        )

    def measure(self, problem: int) -> list[PrefixValues]:
        """Sample the responses to a problem and estimate the values of their prefixes.

        Cost: ``K`` rollouts from each prefix and K more from the prompt, for each response.
        """
        config = self.config
        encoder = self.encoder()
        # The responses themselves, as training would sample them.
        (sample,) = draw_samples(self.task, "train", [problem])
        generated = sample_responses(
            self.model,
            encoder,
            [sample],
            group_size=config.group_size,
            max_response_tokens=config.max_response_tokens,
            temperature=config.temperature,
            seed=config.seed,
            step=problem,
        )
        responses = judge(self.task, self.tokenizer, [sample] * config.group_size, generated)
        prompt = encoder.ids(sample)

        # The value of every prefix of each response.
        measured = []
        for number in range(config.group_size):
            is_token = responses.response_mask[number]
            in_response = responses.input_ids[number, responses.prompt_length :]
            ids: list[int] = in_response[is_token].tolist()
            prefixes = self._prefixes(sample, ids)

            # The prompt is continued twice: its first K rollouts are the separate estimate of its value.
            starts = [0, *prefixes[:-1]]
            rewards = self._rewards(encoder, sample, prompt, ids, starts, number)
            of_prompt = rewards[0]
            of_prefixes = rewards[1:]

            # Two estimates of the value of each prefix, from separate halves of its rollouts.
            half = self.num_rollouts // 2
            first_half = [_mean(of_prefix[:half]) for of_prefix in of_prefixes]
            second_half = [_mean(of_prefix[half:]) for of_prefix in of_prefixes]
            # The value after the last token is the reward: it is known, and has no noise.
            reward = float(responses.rewards[number])
            measured.append(
                PrefixValues(
                    problem=problem,
                    number=number,
                    ids=ids,
                    truncated=bool(responses.truncated[number]),
                    reward=reward,
                    prefixes=prefixes,
                    first_half=[*first_half, reward],
                    second_half=[*second_half, reward],
                    start_value=_mean(of_prompt),
                )
            )
        return measured

    def _prefixes(self, sample: Sample, ids: list[int]) -> list[int]:
        """Return the prefixes that get a value: before every token, or before every step; the whole response last."""
        if self.step_end is None:
            return list(range(len(ids) + 1))
        # Steps end in the text, prefixes at tokens: the ends of steps and the starts of tokens, both as characters
        # of the response.
        encoded = encode(self.tokenizer, sample.prompt, ids, warn=False)
        response_text = encoded.text[encoded.response_start :]
        ends = [match.end() for match in re.finditer(self.step_end, response_text)]
        response_spans = encoded.spans[encoded.prompt_length : encoded.prompt_length + len(ids)]
        starts = [span[0] - encoded.response_start for span in response_spans]

        # A step starts at the first token that begins at or after the end of the step before.
        prefixes = [0]
        for index in range(1, len(ids)):
            if any(starts[index - 1] < end <= starts[index] for end in ends):
                prefixes.append(index)
        return [*prefixes, len(ids)]

    def _rewards(
        self,
        encoder: PromptEncoder,
        sample: Sample,
        prompt: list[int],
        ids: list[int],
        starts: Sequence[int],
        number: int,
    ) -> list[list[float]]:
        """Return the rewards of K continuations of each prefix.

        The noise of a continuation is a function of seed, problem, response, place in ``starts`` and its own number.
        """
        jobs = [(place, copy) for place in range(len(starts)) for copy in range(self.num_rollouts)]
        rewards: list[list[float]] = [[] for _ in starts]
        # Continuations of several prefixes share a batch, so that short responses fill it too.
        for first in range(0, len(jobs), self.batch_size):
            part = jobs[first : first + self.batch_size]
            prefixes = []
            seeds = []
            for place, copy in part:
                prefixes.append(ids[: starts[place]])
                seeds.append(derive(self.config.seed, "monte_carlo", sample.index, number, place, copy))
            full = self._continued(encoder.ending, prompt, prefixes, seeds)

            # A reward belongs to the complete response: prefix and continuation.
            judged = judge(self.task, self.tokenizer, [sample] * len(part), full)
            for (place, _), reward in zip(part, judged.rewards.tolist(), strict=True):
                rewards[place].append(reward)
        return rewards

    def _continued(
        self, ending: Ending, prompt: list[int], prefixes: Sequence[list[int]], seeds: Sequence[int]
    ) -> Generated:
        """Sample a continuation of each prefix, and return the complete responses."""
        config = self.config
        # The shortest prefix has most tokens left; the others are cut at the limit afterwards.
        shortest = min(len(prefix) for prefix in prefixes)
        generated = generate(
            self.model,
            [prompt + prefix for prefix in prefixes],
            seeds,
            ending=ending,
            max_new_tokens=config.max_response_tokens - shortest,
            temperature=config.temperature,
        )
        responses = []
        truncated = []
        for row, prefix in enumerate(prefixes):
            is_new = generated.response_mask[row]
            new = generated.input_ids[row, generated.prompt_length :][is_new].tolist()
            response, is_cut = _complete(prefix, new, ending, config.max_response_tokens)
            responses.append(response)
            truncated.append(is_cut)
        return as_generated(prompt, responses, truncated, ending)


def _complete(prefix: list[int], new: list[int], ending: Ending, limit: int) -> tuple[list[int], bool]:
    """Join a prefix and its continuation, end it where the policy's own sampling would, and tell if it was cut off."""
    response = prefix + new
    for length in range(len(prefix) + 1, min(len(response), limit) + 1):
        is_end = response[length - 1] in ending.end_ids
        # A stop string may begin in the prefix, which generation does not read.
        if is_end or (ending.stops is not None and ending.stops.ends(response[:length])):
            return response[:length], False
    return response[:limit], True


def as_generated(
    prompt: Sequence[int], responses: Sequence[Sequence[int]], truncated: Sequence[bool], ending: Ending
) -> Generated:
    """Return responses to one prompt as the record that generation returns."""
    # Prompts are padded on the left and responses on the right; one prompt needs no padding.
    num_responses = len(responses)
    prompt_length = len(prompt)
    longest = max(len(response) for response in responses)
    input_ids = torch.full((num_responses, prompt_length + longest), ending.pad_id, dtype=torch.int64)
    response_mask = torch.zeros(num_responses, longest, dtype=torch.bool)
    input_ids[:, :prompt_length] = torch.tensor(list(prompt), dtype=torch.int64)
    for row, response in enumerate(responses):
        end = prompt_length + len(response)
        input_ids[row, prompt_length:end] = torch.tensor(list(response), dtype=torch.int64)
        response_mask[row, : len(response)] = True
    of_prompt = torch.ones(num_responses, prompt_length, dtype=torch.bool)
    return Generated(
        input_ids=input_ids,
        attention_mask=torch.cat([of_prompt, response_mask], 1),
        prompt_length=prompt_length,
        response_mask=response_mask,
        truncated=torch.tensor(list(truncated), dtype=torch.bool),
        end_ids=ending.end_ids,
    )


def judged_again(sampler: Sampler, measured: Sequence[PrefixValues]) -> Responses:
    """Return the measured responses to one problem with their regions and rewards, from their ids."""
    encoder = sampler.encoder()
    (sample,) = draw_samples(sampler.task, "train", [measured[0].problem])
    prompt = encoder.ids(sample)
    responses = [one.ids for one in measured]
    truncated = [one.truncated for one in measured]
    generated = as_generated(prompt, responses, truncated, encoder.ending)
    return judge(sampler.task, sampler.tokenizer, [sample] * len(measured), generated)


def _mean(rewards: Sequence[float]) -> float:
    """Average rewards."""
    return sum(rewards) / len(rewards)


# The file -----------------------------------------------------------------------------------------------


class ValuesFile:
    """The values of each problem as a line of a file, so that a stopped run continues.

    The first line holds the settings; a file of other settings is rejected. A last line that was cut off is measured
    again.

    Args:
        path: the file; None keeps nothing.
        settings: JSON values that the values depend on.

    Raises:
        ConfigError: the file was made with other settings, or holds something else.
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path = path
        self._known: dict[int, list[PrefixValues]] = {}
        if path is None:
            return
        # Through JSON, so that tuples compare equal to the lists that a file holds.
        header = {"schema": SCHEMA, **json.loads(json.dumps(settings))}
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            complete = text[: text.rfind("\n") + 1]
            if complete:
                self._read(complete.splitlines(), header)
            else:
                complete = json.dumps(header) + "\n"
            # Half a line is removed, because the next line would be appended to it.
            if complete != text:
                path.write_text(complete, encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"out: must hold a file that can be written, got {path} ({error.strerror}); choose another folder"
            ) from error

    def get(self, problem: int) -> list[PrefixValues] | None:
        """Return the values of a problem that the file has already."""
        return self._known.get(problem)

    def add(self, problem: int, measured: list[PrefixValues]) -> None:
        """Write the values of a problem."""
        if self._path is None:
            return
        line = json.dumps({"problem": problem, "responses": [asdict(one) for one in measured]})
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")

    def _read(self, lines: list[str], header: dict[str, Any]) -> None:
        """Read the lines of a file."""
        try:
            found = json.loads(lines[0])
            rows = [json.loads(line) for line in lines[1:]]
            for row in rows:
                self._known[row["problem"]] = [PrefixValues(**values) for values in row["responses"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"out: must hold values of a credit benchmark, got {self._path}, which is something else; choose "
                "another folder"
            ) from error
        # Values of another model, task or length would be mixed with those of this run.
        different = [name for name in header if found.get(name) != header[name]]
        if different:
            name = different[0]
            raise ConfigError(
                f"out: must hold values of the same settings, got {self._path} with {name} {found.get(name)!r} instead "
                f"of {header[name]!r}; choose another folder, or delete the file"
            )


def measured_problems(
    sampler: Sampler, num_problems: int, values: ValuesFile, progress: Progress | None
) -> Iterator[list[PrefixValues]]:
    """Yield the values of each problem, from the file where it has them."""
    for problem in range(num_problems):
        measured = values.get(problem)
        if measured is None:
            measured = sampler.measure(problem)
            values.add(problem, measured)
        if progress is not None:
            progress(problem + 1, num_problems)
        yield measured

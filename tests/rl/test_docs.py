"""The pages on training are correct: their Python runs, their commands parse, their rules are as described."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from rl import ActorCritic, CreditConfig, LoraConfig, PPOConfig, PPOTrainer, load_chain_model, make_task
from rl.cli import app
from rl.credit import registry
from rl.credit.registry import find_rule
from rl.credit.scope import tokens_in_scope
from rl.credit.scoring import score_rollout
from rl.rollouts.rollout import PromptEncoder, judge, sample_responses
from tests.fixtures.policies import alphabet, tiny_policy

DOCS = Path(__file__).parents[2] / "docs"
GROUP = typer.main.get_command(app)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language on a page, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no {language} block left to test"
    return found


def commands() -> list[str]:
    text = "".join(block for page in ("train.md", "credit.md") for block in blocks(page, "bash"))
    return [line.split("#")[0].strip() for line in text.splitlines() if line.strip()]


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the Python of the credit page defines; its rules leave the registry afterwards."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks("credit.md", "python"):
        exec(block, names)
    return names


def test_the_rules_of_the_credit_page_compute_what_they_describe(rules: dict[str, Any]):
    model, tokenizer = load_chain_model()
    task, config = make_task("chain"), LoraConfig(rank=2)
    policy = ActorCritic(model, config, critic=False, seed=0)
    encoder = PromptEncoder(tokenizer, policy.causal_lm, 100, 40)
    samples = [task.sample("train", number) for number in range(4)]
    generated = sample_responses(
        policy.causal_lm, encoder, samples, group_size=1, max_response_tokens=40, temperature=1.0, seed=5, step=0
    )
    responses = judge(task, tokenizer, samples, generated)
    assert responses.response_mask.all(0).sum() < responses.response_mask.shape[1], "nothing is padded"

    def scores(rule: str) -> torch.Tensor:
        credit = CreditConfig(rule=rule, scope="response")
        scored = score_rollout(
            policy, responses, credit, temperature=1.0, micro_batch_size=4, seed=0, step=0, reference=False
        )
        return scored.credit.scores

    surprisal, received = scores("surprisal"), scores("received")
    scored = tokens_in_scope(responses, "response")
    assert scored.any(1).all()
    eager, _ = load_chain_model()
    eager.set_attn_implementation("eager")
    origin = responses.prompt_length
    for row, mask in enumerate(responses.attention_mask.bool()):
        ids, first = responses.input_ids[row, mask], int(mask[:origin].sum())
        with torch.no_grad():
            out = eager(ids[None], output_attentions=True)
        largest = [layer[0].amax(0) for layer in out.attentions[:3]]  # over heads; rows sum to 1 again
        read = torch.stack([layer / layer.sum(-1, keepdim=True) for layer in largest]).mean(0).sum(0)
        told = out.logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        own = scored[row, : int(responses.response_mask[row].sum())]
        torch.testing.assert_close(received[row, : len(own)][own], read[first:][own], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(surprisal[row, : len(own)][own], -told[first - 1 :][own], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", ["surprisal", "received"])
def test_the_rules_of_the_credit_page_train(rules: dict[str, Any], rule: str):
    model, tokenizer = load_chain_model()
    config = PPOConfig(
        steps=1, num_prompts=2, group_size=2, advantage="group", max_response_tokens=16, credit=CreditConfig(rule=rule),
        lora=LoraConfig(rank=2),
    )  # fmt: skip
    (row,) = PPOTrainer(model, tokenizer, task="chain", config=config, progress=False).train()
    assert find_rule(rule).summary
    assert 0.3 < row["raised_share"] < 0.6, "the default top 40 %"


def test_the_python_of_the_training_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The code of the page with fewer and shorter responses; the model lies in the folder that the page names."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    tiny_policy(context=512).save_pretrained("path/or/name")
    alphabet().save_pretrained("path/or/name")
    Path("problems.jsonl").write_text('{"prompt": "3+4?", "answer": "7"}\n{"prompt": "2+2?", "answer": "4"}\n')
    names: dict[str, Any] = {"__name__": "docs"}
    training, reward = blocks("train.md", "python")
    for written, short in (("steps=200", "steps=1, max_response_tokens=8"), ("num_prompts=16", "num_prompts=2")):
        assert written in training
        training = training.replace(written, short)
    exec(training, names)
    assert [row["step"] for row in names["history"]] == [1]
    assert list(Path("runs/countdown").glob("checkpoint-*/policy/adapter_config.json"))
    exec(reward, names)
    task = names["task"]
    first = task.sample("train", 0)
    assert (task.reward(first, "it is 7"), task.reward(first, "it is 8")) == (float(first.answer == "7"), 0.0)
    config = PPOConfig(steps=1, num_prompts=2, group_size=2, advantage="rloo", max_response_tokens=4,
                       credit=CreditConfig(rule="uniform"))  # fmt: skip
    history = PPOTrainer(tiny_policy(), alphabet(), task=task, config=config, progress=False).train()
    assert 0 <= history[0]["reward"] <= 1


def test_the_yaml_of_the_training_page_is_a_config_of_accelerate(tmp_path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    (block,) = blocks("train.md", "yaml")
    (tmp_path / "accelerate.yaml").write_text(block)
    loaded = load_config_from_file(str(tmp_path / "accelerate.yaml"))
    assert loaded.num_processes == yaml.safe_load(block)["num_processes"]


@pytest.mark.parametrize("line", commands())
def test_the_commands_of_the_pages_parse(line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(DOCS.parent)
    words = shlex.split(line)
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(words[2:])
        if launch.training_script == "benchmarks/configs/trl/train.py":
            check_trl(launch)
            return
        assert (launch.module, launch.training_script) == (True, "rl.cli")
        words = ["flowgraph-rl", *launch.training_script_args]
    assert words[0] == "flowgraph-rl"
    name, command, rest = GROUP.resolve_command(typer.Context(GROUP), words[1:])  # type: ignore[attr-defined]
    if "--help" not in rest:
        command.make_context(name, list(rest))


def check_trl(launch: Any) -> None:
    """The launch file and the arguments of TRL are read; nothing is launched."""
    from accelerate.commands.config.config_args import load_config_from_file

    pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is an optional package: pip install trl")
    from benchmarks.configs.trl import train

    assert load_config_from_file(launch.config_file).distributed_type in ("FSDP", "DEEPSPEED")
    run, *_ = train.parsed([*launch.training_script_args, "--use_cpu", "true"])
    assert run.problems == "problems.jsonl"

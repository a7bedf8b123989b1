"""The adapters of engines on stub modules of the documented shape; docs/engines.md says what ran in the engine itself.

Every stub has the names and signatures of the engine at the version that the adapter cites, and nothing else of it.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import re
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flowgraph import MissingExtraError
from rl.config import CreditConfig
from rl.errors import ConfigError
from rl.integrations import engine_credit as module
from rl.integrations.engine_credit import EngineCredit, EngineSequence
from rl.integrations.prime_rl import flow_prime_algorithm
from rl.integrations.rllm import flow_rllm_grouping, precompute_advantages
from rl.integrations.skyrl import flow_skyrl_trainer
from rl.integrations.slime import flow_slime_advantages
from rl.integrations.verl import flow_verl_trainer
from tests.fixtures.engines import engine_credit, sequences, uniform_credit

SOFT = CreditConfig(rule="reach_sharp", shape="soft", floor=0.5, ceiling=2.0)
ADVANTAGES = [1.25, -0.75, 0.1, -0.3]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Installed engines, by the name of their distribution."""
    installed = {"verl": "0.9.1", "skyrl": "0.3.0", "slime": "0.3.1", "prime-rl": "0.8.0", "rllm": "0.3.0rc0"}
    monkeypatch.setattr(module, "version", lambda name: installed[name])
    return installed


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """Put a module with these members in the place of an engine's, and its parents where they are missing."""
    parts = name.split(".")
    for size in range(1, len(parts)):
        parent = ".".join(parts[:size])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    found = ModuleType(name)
    for member, value in members.items():
        setattr(found, member, value)
    monkeypatch.setitem(sys.modules, name, found)
    return found


def plain_advantages() -> list[torch.Tensor]:
    """One number for each response, as group baselines give them, on all of its tokens."""
    found = []
    for sequence, value in zip(sequences(), ADVANTAGES, strict=True):
        found.append(torch.full((len(sequence.response_ids),), value))
    return found


def expected(credit: EngineCredit) -> list[torch.Tensor]:
    """Advantages times the weights, by the definition."""
    weights = credit.weigh(sequences()).weights
    found = []
    for row, own in enumerate(plain_advantages()):
        found.append(own * weights[row, : len(own)])
    assert any((one != other).any() for one, other in zip(found, plain_advantages(), strict=True))
    return found


# verl ---------------------------------------------------------------------------------------------------


class Queue:
    """The two functions of TransferQueue that the trainer uses, on a dictionary of nested tensors."""

    def __init__(self, fields: dict[str, torch.Tensor]) -> None:
        self.fields = fields

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, torch.Tensor]:
        assert (keys, partition_id) == (["0", "1", "2", "3"], "train")
        return {name: self.fields[name] for name in select_fields}

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: dict[str, torch.Tensor]) -> Any:
        self.fields.update(fields)
        return SimpleNamespace(keys=keys, partition_id=partition_id)


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> Queue:
    """verl.trainer.ppo.v1 with a trainer that writes group advantages into the queue, as verl's does."""
    given = sequences()
    queue = Queue(
        {
            "prompts": nested([torch.tensor(sequence.prompt_ids) for sequence in given]),
            "responses": nested([torch.tensor(sequence.response_ids) for sequence in given]),
            "response_mask": nested([torch.ones(len(sequence.response_ids), dtype=torch.int64) for sequence in given]),
        }
    )

    class PPOTrainer:
        global_steps = 5
        total_training_steps = 10

        def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
            metrics["seen"] = 1.0
            plain = nested(plain_advantages())
            return queue.kv_batch_put(batch.keys, batch.partition_id, {"advantages": plain, "returns": plain})

    class PPOTrainerSync(PPOTrainer):
        pass

    stub(monkeypatch, "verl.trainer.ppo.v1", PPOTrainer=PPOTrainer, PPOTrainerSync=PPOTrainerSync)
    stub(monkeypatch, "transfer_queue", kv_batch_get=queue.kv_batch_get, kv_batch_put=queue.kv_batch_put)
    stub(monkeypatch, "tensordict", TensorDict=lambda fields, batch_size: dict(fields))
    return queue


def run_verl(queue: Queue, credit: EngineCredit) -> list[torch.Tensor]:
    trainer = flow_verl_trainer(credit)()
    metrics: dict[str, Any] = {}
    batch = SimpleNamespace(keys=["0", "1", "2", "3"], partition_id="train")
    assert trainer._compute_advantage(batch, metrics=metrics).keys == batch.keys
    assert metrics == {"seen": 1.0}
    return list(queue.fields["advantages"].unbind())


def test_verl_writes_weighted_advantages_back(verl: Queue):
    credit = engine_credit(SOFT)
    for one, other in zip(run_verl(verl, credit), expected(credit), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(verl.fields["returns"].unbind(), plain_advantages(), strict=True):
        assert torch.equal(one, other)


def test_verl_with_weights_of_one_is_verl(verl: Queue):
    for one, other in zip(run_verl(verl, uniform_credit()), plain_advantages(), strict=True):
        assert torch.equal(one, other)


def test_verl_tells_its_progress(verl: Queue):
    """Halfway through a run whose weights reach 1 at the end, half of each weight is left."""
    credit = engine_credit(CreditConfig(rule="reach_sharp", shape="soft", anneal=1.0))
    weights = credit.weigh(sequences()).weights
    for row, (one, own) in enumerate(zip(run_verl(verl, credit), plain_advantages(), strict=True)):
        torch.testing.assert_close(one, own * (1 + 0.5 * (weights[row, : len(own)] - 1)))


def test_verl_refuses_tokens_of_tools_and_other_classes(verl: Queue):
    masks = [mask.clone() for mask in verl.fields["response_mask"].unbind()]
    masks[3][2] = 0
    verl.fields["response_mask"] = nested(masks)
    with pytest.raises(
        ConfigError, match=r"trained: must be True on all tokens.*got 8 of 9 in sequence 3; responses wi"
    ):
        run_verl(verl, uniform_credit())
    with pytest.raises(
        ConfigError, match=r"base: must be a subclass of verl.trainer.ppo.v1.PPOTrainer, got <class 'dic"
    ):
        flow_verl_trainer(uniform_credit(), dict)


# SkyRL --------------------------------------------------------------------------------------------------


def skyrl_batch() -> dict[str, torch.Tensor]:
    """A batch in SkyRL's layout: padding on the left of each prompt, response tensors aligned on the right."""
    given = sequences()
    width = max(len(sequence.prompt_ids) + len(sequence.response_ids) for sequence in given)
    size = max(len(sequence.response_ids) for sequence in given)
    ids = torch.zeros(len(given), width, dtype=torch.int64)
    mask = torch.zeros(len(given), width, dtype=torch.int64)
    response_mask = torch.zeros(len(given), size, dtype=torch.int64)
    for row, sequence in enumerate(given):
        tokens = torch.tensor([*sequence.prompt_ids, *sequence.response_ids])
        ids[row, width - len(tokens) :] = tokens
        mask[row, width - len(tokens) :] = 1
        response_mask[row, size - len(sequence.response_ids) :] = 1
    return {
        "sequences": ids,
        "attention_mask": mask,
        "response_mask": response_mask,
        "loss_mask": response_mask.float(),
    }


@pytest.fixture
def skyrl(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> type:
    """skyrl.train.trainer with a trainer that sets group advantages on the response mask."""

    class RayPPOTrainer:
        global_step = 1
        total_training_steps = None

        def __init__(self, step_wise: bool = False, whitens: bool = False) -> None:
            algorithm = Namespace(advantage_batch_normalize=whitens)
            self.cfg = Namespace(
                generator=Namespace(step_wise_trajectories=step_wise), trainer=Namespace(algorithm=algorithm)
            )

        def compute_advantages_and_returns(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            values = torch.tensor([*ADVANTAGES, 7.0][: len(data["sequences"])])
            data["advantages"] = values[:, None] * data["response_mask"]
            data["returns"] = data["advantages"]
            return data

    stub(monkeypatch, "skyrl.train.trainer", RayPPOTrainer=RayPPOTrainer)
    return RayPPOTrainer


def test_skyrl_scales_the_last_columns_of_each_row(skyrl: type):
    credit = engine_credit(SOFT)
    data = flow_skyrl_trainer(credit)().compute_advantages_and_returns(skyrl_batch())
    for row, own in enumerate(expected(credit)):
        size = data["advantages"].shape[1] - len(own)
        assert torch.equal(data["advantages"][row, size:], own)
        assert (data["advantages"][row, :size] == 0).all()
    assert torch.equal(data["returns"], torch.tensor(ADVANTAGES)[:, None] * data["response_mask"])


def test_skyrl_with_weights_of_one_is_skyrl(skyrl: type):
    plain = skyrl().compute_advantages_and_returns(skyrl_batch())
    data = flow_skyrl_trainer(uniform_credit())().compute_advantages_and_returns(skyrl_batch())
    assert torch.equal(data["advantages"], plain["advantages"])


def test_skyrl_tells_its_progress_where_it_knows_it(skyrl: type):
    credit = engine_credit(CreditConfig(rule="reach_sharp", shape="soft", anneal=0.5))
    with pytest.raises(ConfigError, match=r"credit.anneal: must be 0 where the engine does not tell its progress"):
        flow_skyrl_trainer(credit)().compute_advantages_and_returns(skyrl_batch())
    trainer = flow_skyrl_trainer(credit)()
    trainer.total_training_steps = 2
    data = trainer.compute_advantages_and_returns(skyrl_batch())
    assert torch.equal(data["advantages"], data["returns"])


def test_skyrl_leaves_rows_that_fill_the_batch_alone(skyrl: type):
    """SkyRL repeats its first row with a loss mask of 0 until the batch can be divided among the ranks."""
    credit = engine_credit(SOFT)
    batch = {name: torch.cat([value, value[:1]]) for name, value in skyrl_batch().items()}
    batch["loss_mask"][4] = 0
    found = flow_skyrl_trainer(credit)().compute_advantages_and_returns(batch)["advantages"]
    assert torch.equal(
        found[:4], flow_skyrl_trainer(credit)().compute_advantages_and_returns(skyrl_batch())["advantages"]
    )
    assert torch.equal(found[4], 7.0 * batch["response_mask"][4])


def test_skyrl_refuses_what_would_give_wrong_weights(skyrl: type):
    trainer = flow_skyrl_trainer(uniform_credit())
    with pytest.raises(ConfigError, match=r"generator.step_wise_trajectories: must be false.*got true; turn it off"):
        trainer(step_wise=True).compute_advantages_and_returns(skyrl_batch())
    with pytest.raises(
        ConfigError, match=r"advantage_batch_normalize: must be false.*whiten the weights too, got true"
    ):
        trainer(whitens=True).compute_advantages_and_returns(skyrl_batch())
    turned = skyrl_batch()
    turned["response_mask"] = turned["response_mask"].flip(1)
    with pytest.raises(ConfigError, match=r"response_mask: must be 1 on the last 8 columns of sequence 0, got another"):
        trainer().compute_advantages_and_returns(turned)
    with pytest.raises(ConfigError, match=r"base: must be a subclass of skyrl.train.trainer.RayPPOTrainer, got <cl"):
        flow_skyrl_trainer(uniform_credit(), dict)


# slime --------------------------------------------------------------------------------------------------


def slime_batch() -> dict[str, Any]:
    given = sequences()
    return {
        "tokens": [torch.tensor([*sequence.prompt_ids, *sequence.response_ids]) for sequence in given],
        "response_lengths": [len(sequence.response_ids) for sequence in given],
        "loss_masks": [torch.ones(len(sequence.response_ids), dtype=torch.int32) for sequence in given],
        "rewards": list(ADVANTAGES),
    }


def slime_arguments(**changes: Any) -> Namespace:
    arguments = {"normalize_advantages": False, "use_opd": True, "custom_advantage_function_path": "module.function"}
    return Namespace(**{**arguments, **changes})


@pytest.fixture
def slime(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """slime.backends.megatron_utils.loss with a function that spreads each reward over its response."""

    def compute_advantages_and_returns(args: Namespace, rollout_data: dict[str, Any]) -> None:
        assert args.custom_advantage_function_path is None
        assert not args.use_opd
        rollout_data["advantages"] = plain_advantages()
        rollout_data["returns"] = plain_advantages()

    stub(
        monkeypatch,
        "slime.backends.megatron_utils.loss",
        compute_advantages_and_returns=compute_advantages_and_returns,
    )


@pytest.mark.usefixtures("slime")
def test_slime_gets_its_own_advantages_times_the_weights():
    credit = engine_credit(SOFT)
    data = slime_batch()
    args = slime_arguments()
    flow_slime_advantages(credit)(args, data)
    for one, other in zip(data["advantages"], expected(credit), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(data["returns"], plain_advantages(), strict=True):
        assert torch.equal(one, other)
    assert (args.use_opd, args.custom_advantage_function_path) == (True, "module.function")


@pytest.mark.usefixtures("slime")
def test_slime_with_weights_of_one_is_slime():
    data = slime_batch()
    data["loss_masks"][1][:] = 0  # a sample that slime removed
    flow_slime_advantages(uniform_credit())(slime_arguments(), data)
    for one, other in zip(data["advantages"], plain_advantages(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("slime")
def test_slime_refuses_what_would_give_wrong_weights():
    function = flow_slime_advantages(uniform_credit())
    with pytest.raises(ConfigError, match=r"normalize_advantages: must be off.*got True; leave --normalize-advantages"):
        function(slime_arguments(normalize_advantages=True), slime_batch())
    for key in ("tokens", "loss_masks"):
        with pytest.raises(ConfigError, match=rf"rollout_data: must hold tokens.*got no '{key}'; use the rollout data"):
            function(slime_arguments(), {**slime_batch(), key: None})
    with pytest.raises(
        ConfigError, match=r"rollout_data: rewards must have one entry for each of 4.*got 1; pass those"
    ):
        function(slime_arguments(), {**slime_batch(), "rewards": [1.0]})
    with pytest.raises(ConfigError, match=r"response_lengths must leave a token of the prompt, got 99 of 18 tokens in"):
        function(slime_arguments(), {**slime_batch(), "response_lengths": [99, 3, 6, 9]})

    def shares(args: Namespace, rollout_data: dict[str, Any]) -> None:
        """Context parallelism: each rank has a part of every response."""
        rollout_data["advantages"] = [own[::2] for own in plain_advantages()]

    with pytest.raises(
        ConfigError, match=r"advantages: must be 8 floats in sequence 0.*not parts that several ranks sh"
    ):
        flow_slime_advantages(uniform_credit(), shares)(slime_arguments(), slime_batch())


# prime-rl -----------------------------------------------------------------------------------------------


@dataclass
class Node:
    token_ids: list[int]
    mask: list[bool]
    parent: int | None
    advantages: list[float] | None = None


@dataclass
class Trace:
    nodes: list[Node]
    reward: float
    id: str = "trace"


@dataclass
class Episode:
    traces: list[Trace] = field(default_factory=list)


def prime_episodes() -> list[Episode]:
    """A prompt of two messages, the sampled turn, and what the template writes behind it."""
    found = []
    for sequence, reward in zip(sequences(), ADVANTAGES, strict=True):
        prompt = list(sequence.prompt_ids)
        response = list(sequence.response_ids)
        nodes = [
            Node(prompt[:1], [False], None),
            Node(prompt[1:], [False] * (len(prompt) - 1), 0),
            Node([*response, 5], [*[True] * len(response), False], 1),
        ]
        found.append(Episode([Trace(nodes, reward)]))
    return found


@pytest.fixture
def prime(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> type:
    """prime_rl.orchestrator.algo with a group algorithm; values go to the sampled tokens in the order of the nodes."""

    def iter_trainable_traces(episodes: list[Episode]) -> Any:
        for episode in episodes:
            for trace in episode.traces:
                yield episode, trace

    def assign_advantages(trace: Trace, values: float | list[float]) -> None:
        nodes = [node for node in trace.nodes if any(node.mask)]
        total = sum(sum(node.mask) for node in nodes)
        every = [values] * total if isinstance(values, float) else list(values)
        assert len(every) == total
        for node in nodes:
            node.advantages = every[: sum(node.mask)]
            every = every[sum(node.mask) :]

    class Algorithm:
        async def score_group(self, episodes: list[Episode]) -> None:
            """Assign nothing."""

    class GRPOAlgorithm(Algorithm):
        async def score_group(self, episodes: list[Episode]) -> None:
            for _, trace in iter_trainable_traces(episodes):
                assign_advantages(trace, trace.reward)

    stub(monkeypatch, "prime_rl.orchestrator.algo", Algorithm=Algorithm, GRPOAlgorithm=GRPOAlgorithm)
    stub(monkeypatch, "prime_rl.orchestrator.algo.base", iter_trainable_traces=iter_trainable_traces)
    stub(monkeypatch, "prime_rl.orchestrator.algo.routing", assign_advantages=assign_advantages)
    return Algorithm


def run_prime(credit: EngineCredit, episodes: list[Episode], base: Any = None) -> list[Any]:
    asyncio.run(flow_prime_algorithm(credit, base)().score_group(episodes))
    return [episode.traces[0].nodes[2].advantages for episode in episodes]


def test_prime_rl_assigns_weighted_advantages(prime: type):
    credit = engine_credit(SOFT)
    weights = credit.weigh(sequences()).weights
    for row, values in enumerate(run_prime(credit, prime_episodes())):
        expected_values = ADVANTAGES[row] * weights[row, : len(values)].double()
        assert values == expected_values.tolist()
    assert any(weights[0] != 1)


def test_prime_rl_with_weights_of_one_is_prime_rl(prime: type):
    for row, values in enumerate(run_prime(uniform_credit(), prime_episodes())):
        assert values == [ADVANTAGES[row]] * len(sequences()[row].response_ids)
    assert run_prime(uniform_credit(), []) == []


def test_prime_rl_refuses_traces_of_another_form(prime: type):
    credit = uniform_credit()
    turns = prime_episodes()
    turns[1].traces[0].nodes[0].mask = [True]
    with pytest.raises(
        ConfigError, match=r"episodes: must hold traces of one turn, got several turns in trace 'trace'"
    ):
        run_prime(credit, turns)
    branches = prime_episodes()
    branches[2].traces[0].nodes[2].parent = 0
    with pytest.raises(
        ConfigError, match=r"episodes: must hold traces of one turn, got branches in trace 'trace'; tok"
    ):
        run_prime(credit, branches)
    short = prime_episodes()
    short[0].traces[0].nodes[1].mask = [False]
    with pytest.raises(
        ConfigError, match=r"mask: must have one flag for each of 9 tokens in node 1 of.*got 1; use the"
    ):
        run_prime(credit, short)
    with pytest.raises(ConfigError, match=r"base: must assign advantages in score_group, got none in node 2 of trace"):
        run_prime(credit, prime_episodes(), prime)


# rLLM ---------------------------------------------------------------------------------------------------


def rllm_groups(**changes: Any) -> list[Any]:
    """Two groups of two trajectories, with one step each."""
    steps = []
    for sequence in sequences():
        step = {"prompt_ids": list(sequence.prompt_ids), "response_ids": list(sequence.response_ids)}
        steps.append(SimpleNamespace(**{**step, "reward": 0.0, "advantage": None, **changes}))
    trajectories = []
    for step, reward in zip(steps, ADVANTAGES, strict=True):
        trajectories.append(SimpleNamespace(steps=[step], reward=reward))
    return [
        SimpleNamespace(trajectories=trajectories[:2], group_role="solver", group_id="task1:solver"),
        SimpleNamespace(trajectories=trajectories[2:], group_role="solver", group_id="task2:solver"),
    ]


def rllm_config(**changes: Any) -> Namespace:
    return Namespace(**{"use_precomputed_advantage": True, "estimator": "plain", "estimator_map": {}, **changes})


@pytest.fixture
def rllm(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """rllm.trainer.algorithms with an estimator whose advantages are the rewards."""

    def get_rllm_adv_estimator(name: str) -> Any:
        def plain(rewards: list[Any], algorithm_config: Any, traj_groups: list[Any]) -> tuple[list[Any], list[Any]]:
            assert name == "plain"
            assert len(rewards) == len(traj_groups)
            return rewards, rewards

        return plain

    stub(monkeypatch, "rllm.trainer.algorithms.advantage", get_rllm_adv_estimator=get_rllm_adv_estimator)
    stub(
        monkeypatch,
        "rllm.trainer.algorithms.transform",
        _default_traj_grouping_hook=lambda episodes, transform, filtering=None: episodes,
    )


def advantages_of(groups: list[Any]) -> list[Any]:
    return [trajectory.steps[0].advantage for group in groups for trajectory in group.trajectories]


@pytest.mark.usefixtures("rllm")
def test_rllm_gets_one_advantage_for_each_token():
    credit = engine_credit(SOFT)
    weights = credit.weigh(sequences()).weights
    hook = flow_rllm_grouping(credit, rllm_config())
    groups = hook(rllm_groups(), None)
    for row, values in enumerate(advantages_of(groups)):
        assert len(values) == len(sequences()[row].response_ids)
        assert values == (ADVANTAGES[row] * weights[row, : len(values)].double()).tolist()


@pytest.mark.usefixtures("rllm")
def test_rllm_with_weights_of_one_is_rllm():
    groups = rllm_groups()
    precompute_advantages(groups, uniform_credit(), rllm_config())
    for row, values in enumerate(advantages_of(groups)):
        assert values == [ADVANTAGES[row]] * len(sequences()[row].response_ids)


@pytest.mark.usefixtures("rllm")
def test_rllm_advantages_of_a_workflow_are_weighted():
    groups = rllm_groups()
    own = [0.5, -1.0, 0.25, 0.0, 0.1, 0.2, 0.3, 0.4]
    groups[0].trajectories[0].steps[0].advantage = list(own)
    groups[0].trajectories[1].steps[0].advantage = 2.0
    precompute_advantages(groups, uniform_credit(), rllm_config())
    found = advantages_of(groups)
    assert found[0] == own
    assert found[1] == [2.0] * 3
    assert found[2] == [ADVANTAGES[2]] * 6


@pytest.mark.usefixtures("rllm")
def test_rllm_raises_where_it_would_train_on_zeros():
    groups = rllm_groups()
    groups[1].trajectories[1].steps[0].advantage = [1.0] * 8
    groups[1].trajectories[0].steps[0].advantage = [1.0] * 6
    with pytest.raises(ConfigError, match=r"step.advantage: must be a float or a list of 9 floats.*got 8 values; rLLM"):
        precompute_advantages(groups, uniform_credit(), rllm_config())
    assert advantages_of(groups)[:3] == [None, None, [1.0] * 6]
    groups[1].trajectories[1].steps[0].advantage = None
    with pytest.raises(ConfigError, match=r"step.advantage: must be a float or a list of 9 floats.*got NoneType; rLLM"):
        precompute_advantages(groups, uniform_credit(), rllm_config())
    with pytest.raises(ConfigError, match=r"use_precomputed_advantage: must be true.*got False; set rllm.algorithm"):
        flow_rllm_grouping(uniform_credit(), rllm_config(use_precomputed_advantage=False))
    groups = rllm_groups()
    groups[0].trajectories[0].steps *= 2
    with pytest.raises(
        ConfigError, match=r"groups: must hold trajectories of one step, got 2 steps in group 'task1:so"
    ):
        precompute_advantages(groups, uniform_credit(), rllm_config())


# All engines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("verl", flow_verl_trainer),
        ("skyrl", flow_skyrl_trainer),
        ("slime", flow_slime_advantages),
        ("prime-rl", flow_prime_algorithm),
        ("rllm", lambda credit: flow_rllm_grouping(credit, rllm_config())),
    ],
)
def test_an_engine_of_another_version_is_named_with_the_one_that_is_needed(package, make, versions):
    versions[package] = "0.0.0"
    with pytest.raises(MissingExtraError, match=rf"{package}: must be version 0\.\d.* for this adapter, got 0.0.0; "):
        make(uniform_credit())


@pytest.mark.parametrize("rule", ["reach_sharp", "flow", "entropy"])
def test_every_adapter_gives_the_same_weights(rule, verl, skyrl, slime, prime, rllm):
    """One batch in five layouts."""
    settings = CreditConfig(rule=rule, shape="soft")
    found = run_verl(verl, engine_credit(settings))
    batch = flow_skyrl_trainer(engine_credit(settings))().compute_advantages_and_returns(skyrl_batch())
    data = slime_batch()
    flow_slime_advantages(engine_credit(settings))(slime_arguments(), data)
    groups = rllm_groups()
    precompute_advantages(groups, engine_credit(settings), rllm_config())
    prime_values = run_prime(engine_credit(settings), prime_episodes())
    for row, own in enumerate(found):
        assert torch.equal(batch["advantages"][row, -len(own) :], own)
        assert torch.equal(data["advantages"][row], own)
        torch.testing.assert_close(torch.tensor(advantages_of(groups)[row]), own)
        torch.testing.assert_close(torch.tensor(prime_values[row]), own)


def test_padding_marks_are_no_ids():
    with pytest.raises(ConfigError, match="ids: must be integers in the vocabulary of 45 tokens, got -100"):
        uniform_credit().weigh([EngineSequence([3], [-100])])


def test_the_page_imports_what_there_is():
    """Its Python needs the engines, so it is only compiled here, and its names of this package are looked up."""
    text = (Path(__file__).parents[3] / "docs" / "engines.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "rl":
                for alias in node.names:
                    assert hasattr(importlib.import_module(str(node.module)), alias.name), alias.name


def test_no_adapter_imports_an_engine():
    """The modules load where no engine is installed, and load none where one is."""
    folder = Path(module.__file__).parent
    engines = {"verl", "skyrl", "slime", "prime_rl", "rllm", "transfer_queue", "tensordict", "verifiers", "trl"}
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not engines & {name.split(".")[0] for name in names}, path.name

"""Every setting of a training run, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from rl.errors import ConfigError

Entry = Literal["advantage", "reward", "potential"]
Shape = Literal["top_q", "bottom_q", "only_top", "soft", "raw"]
Sign = Literal["all", "non_negative", "asymmetric"]
Scope = Literal["reasoning", "response"]
AdvantageKind = Literal["gae", "group", "rloo"]
Aggregation = Literal["token_mean", "seq_mean", "dr_grpo"]
KLPlace = Literal["reward", "loss"]
Truncated = Literal["keep", "mask", "bootstrap"]
LRSchedule = Literal["constant", "linear", "cosine"]

_MAY_BE_INFINITE = ("ceiling", "max_grad_norm")
"""Bounds; an infinite one is none."""


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """How tokens are credited. The defaults are those of FlowTracer (arXiv 2606.10646): top 40 % times 1.5.

    Attributes:
        rule: a name from the registry (``flowgraph-rl train --help`` lists them).
        shape: how scores become weights: ``"top_q"`` (``strength`` on the top ``share`` of scored tokens, 1
            elsewhere), ``"bottom_q"`` (the control), ``"only_top"`` (1 on the top share, 0 on the other scored
            tokens), ``"soft"`` (``clip(s / mean(s), floor, ceiling)``), ``"raw"`` (the scores themselves).
        entry: ``"advantage"`` (multiply the policy loss), ``"reward"`` (spread the outcome reward over tokens),
            ``"potential"`` (potential-based shaping by cumulative score). The last two need ``advantage="gae"``.
        share: q, part of the scored tokens of each response that is chosen, in (0, 1].
        strength: gamma, weight of the chosen tokens, positive.
        floor: least weight of the soft shape.
        ceiling: greatest weight of the soft shape.
        sign: ``"all"``, ``"non_negative"`` (weights only where the advantage is not negative) or ``"asymmetric"``
            (``w`` on advantages that are not negative, ``1 / w`` on the others).
        mean_one: divide the weights of the tokens that compete by their mean over the response, so that a rule does
            not also change the size of the step.
        scope: which tokens compete: ``"reasoning"`` (those before the answer) or ``"response"`` (these and the
            answer). Tokens after the answer, such as the end token, never compete and keep weight 1; without an
            answer every token of the response competes.
        potential_scale: total height of the potential for ``entry="potential"``.
        layers: layers whose attention is read.
        heads: how heads are joined.
        rows: ``"emission"`` or ``"literal"``: what an attention row belongs to (see the method page).
        options: settings of the rule itself.
    """

    rule: str = "flow"
    shape: Shape = "top_q"
    entry: Entry = "advantage"
    share: float = 0.4
    strength: float = 1.5
    floor: float = 0.25
    ceiling: float = 4.0
    sign: Sign = "all"
    mean_one: bool = False
    scope: Scope = "reasoning"
    potential_scale: float = 1.0
    layers: str = "middle"
    heads: str = "mean"
    rows: Literal["emission", "literal"] = "emission"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_types(self)
        _within("share", self.share, 0 < self.share <= 1, "lie in (0, 1]", "0.4 is the paper's")
        _within("strength", self.strength, self.strength > 0, "be positive", "1.5 is the paper's, 1 changes nothing")
        _within("floor", self.floor, 0 <= self.floor <= 1, "lie in [0, 1]", "0.25 is the default")
        _within("ceiling", self.ceiling, self.ceiling >= 1, "be at least 1", "4 is the default")
        _within("potential_scale", self.potential_scale, self.potential_scale >= 0, "be at least 0", "1 is the default")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapters; the policy's and the critic's have the same shape.

    Attributes:
        rank: r.
        alpha: updates are scaled by alpha / rank.
        targets: names of linear layers, or ``"all-linear"``.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        _check_types(self)
        _within("lora.rank", self.rank, self.rank >= 1, "be at least 1", "16 is the default")
        _within("lora.alpha", self.alpha, self.alpha > 0, "be positive", "twice the rank is the default")
        _within("lora.targets", self.targets, bool(self.targets), "name at least one layer", "use 'all-linear'")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """One training run.

    Attributes:
        steps: rollout-and-update steps.
        num_prompts: problems per step, over all processes.
        group_size: G, responses per problem.
        max_prompt_tokens: longer prompts are refused.
        max_response_tokens: responses are cut off there.
        temperature: of sampling, and of every log-probability.
        generation_batch_size: responses generated at a time; None: all of a process at once.
        merge_for_generation: generate from weights with the adapter added in, which is faster and takes a copy of the
            adapted weights; the base is put back to the bit afterwards.
        advantage: ``"gae"`` (with a critic), ``"group"`` (reward minus its group's mean) or ``"rloo"`` (minus the
            mean of the others).
        discount: of GAE.
        gae_lambda: of GAE.
        scale_group_std: divide group advantages by their standard deviation (GRPO) or not (Dr. GRPO).
        whiten: normalise GAE advantages over the batch.
        clip: epsilon below, and above unless ``clip_high`` is given.
        clip_high: epsilon above.
        dual_clip: bound on the loss of negative advantages, for example 3.
        value_clip: clip range of value predictions; None: not clipped.
        value_coefficient: weight of the value loss.
        kl_coefficient: beta; None: 0.05 with a critic, 0 without.
        kl_in: ``"reward"`` (k1 per token, needs ``gae`` to be seen per token) or ``"loss"`` (k3).
        kl_target: adapt beta to this KL per response; None: beta is fixed.
        entropy_coefficient: weight of an entropy bonus.
        aggregation: ``"token_mean"`` over the whole minibatch, ``"seq_mean"`` or ``"dr_grpo"``.
        truncated: what to do with responses that were cut off: ``"keep"``, ``"mask"`` (out of the losses) or
            ``"bootstrap"`` (the critic's value stands for what did not happen; needs ``gae``).
        missing_eos_penalty: subtracted from the reward of a response that was cut off.
        epochs: passes over each rollout.
        num_minibatches: optimiser updates per epoch.
        micro_batch_size: sequences per forward pass; changes memory and speed, never the result.
        learning_rate: of the policy's adapter.
        value_learning_rate: of the critic's adapter and head; None: the same.
        lr_schedule: ``"constant"``, ``"linear"`` or ``"cosine"``, after the warm-up.
        warmup_steps: steps of linear warm-up.
        max_grad_norm: gradient clipping, apart for policy and critic.
        seed: of everything.
        save_every: steps between checkpoints; 0: only the last.
        save_every_updates: optimiser updates between checkpoints *inside* a step, the rollout buffer included.
        keep_checkpoints: how many are kept.
        report_every: steps between rollout files for the token-credit report; 0: none.
        credit: see :class:`CreditConfig`.
        lora: see :class:`LoraConfig`.
    """

    steps: int = 100
    num_prompts: int = 8
    group_size: int = 4
    max_prompt_tokens: int = 512
    max_response_tokens: int = 256
    temperature: float = 1.0
    generation_batch_size: int | None = None
    merge_for_generation: bool = True
    advantage: AdvantageKind = "gae"
    discount: float = 1.0
    gae_lambda: float = 0.95
    scale_group_std: bool = True
    whiten: bool = True
    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    kl_coefficient: float | None = None
    kl_in: KLPlace = "reward"
    kl_target: float | None = None
    entropy_coefficient: float = 0.0
    aggregation: Aggregation = "token_mean"
    truncated: Truncated = "keep"
    missing_eos_penalty: float = 0.0
    epochs: int = 1
    num_minibatches: int = 1
    micro_batch_size: int = 32
    learning_rate: float = 1e-4
    value_learning_rate: float | None = None
    lr_schedule: LRSchedule = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    seed: int = 0
    save_every: int = 50
    save_every_updates: int | None = None
    keep_checkpoints: int = 2
    report_every: int = 0
    credit: CreditConfig = field(default_factory=CreditConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("steps", "num_prompts", "group_size", "max_prompt_tokens", "max_response_tokens", "epochs",
                     "num_minibatches", "micro_batch_size", "keep_checkpoints"):  # fmt: skip
            _within(name, getattr(self, name), getattr(self, name) >= 1, "be at least 1", "see PPOConfig for defaults")
        for name in ("temperature", "learning_rate", "max_grad_norm", "clip"):
            _within(name, getattr(self, name), getattr(self, name) > 0, "be positive", "see PPOConfig for defaults")
        for name in ("discount", "gae_lambda"):
            value = getattr(self, name)
            _within(name, value, 0 <= value <= 1, "lie in [0, 1]", "1 and 0.95 are the defaults")
        for name in ("kl_coefficient", "value_coefficient", "entropy_coefficient", "missing_eos_penalty",
                     "warmup_steps", "save_every", "report_every"):  # fmt: skip
            value = getattr(self, name)
            _within(name, value, value is None or value >= 0, "be at least 0", "0 turns it off")
        for name in ("clip_high", "value_clip", "kl_target", "value_learning_rate", "save_every_updates",
                     "generation_batch_size"):  # fmt: skip
            value = getattr(self, name)
            _within(name, value, value is None or value > 0, "be positive", "leave it out to turn it off")
        _within("seed", self.seed, -(2**63) <= self.seed < 2**63, "be a whole number of 64 bits", "0 is the default")
        _within("dual_clip", self.dual_clip, self.dual_clip is None or self.dual_clip > 1, "be above 1", "3 is usual")
        self._check_combinations()

    def _check_combinations(self) -> None:
        sequences = self.num_prompts * self.group_size
        _within("num_minibatches", self.num_minibatches, sequences % self.num_minibatches == 0,
                f"divide the {sequences} responses of a step", "change num_prompts or group_size")  # fmt: skip
        if self.advantage != "gae":
            _within("group_size", self.group_size, self.group_size >= 2,
                    f"be at least 2 for advantage={self.advantage!r}, which compares responses of one prompt",
                    "use group_size=4, or advantage='gae'")  # fmt: skip
            _within("credit.entry", self.credit.entry, self.credit.entry == "advantage",
                    f"be 'advantage' with advantage={self.advantage!r}, which sums the rewards of a response before "
                    "it looks at them and so cannot see where they stand",
                    "use entry='advantage', or advantage='gae'")  # fmt: skip
            _within("truncated", self.truncated, self.truncated != "bootstrap",
                    f"be 'keep' or 'mask' with advantage={self.advantage!r}, which has no critic to bootstrap from",
                    "use advantage='gae'")  # fmt: skip
        _within("kl_target", self.kl_target, self.kl_target is None or self.kl_weight > 0,
                "come with a positive kl_coefficient to start from", "set kl_coefficient=0.05")  # fmt: skip

    @property
    def kl_weight(self) -> float:
        """Beta, after its default was filled in."""
        if self.kl_coefficient is not None:
            return self.kl_coefficient
        return 0.05 if self.advantage == "gae" else 0.0

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """From plain values, as YAML gives them.

        Raises:
            ConfigError: an unknown name, a value of another type, or one that breaks a rule.
        """
        values = dict(settings)
        for name, part in (("credit", CreditConfig), ("lora", LoraConfig)):
            if isinstance(values.get(name), str) and name == "credit":
                values[name] = CreditConfig(rule=values[name])
            elif isinstance(values.get(name), Mapping):
                values[name] = _build(part, values[name], f"{name}.")
        return _build(cls, values, "")


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings in which two configurations differ, as ``name: one -> other``."""
    found = []
    for name in sorted(one.keys() | other.keys()):
        before, after = one.get(name, "(none)"), other.get(name, "(none)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return found


def _build(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    names = [item.name for item in fields(kind)]
    for name in values:
        if name not in names:
            raise ConfigError(
                f"{prefix}{name}: must be a setting of {kind.__name__}, got an unknown name; "
                f"there are {', '.join(names)}"
            )
    return kind(**values)


def _within(name: str, value: Any, holds: bool, rule: str, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{name}: must {rule}, got {value!r}; {remedy}")


def _check_types(config: Any) -> None:
    """Values have the type of their field; whole numbers serve as floats."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            _within(name, value, value in get_args(hint), f"be one of {', '.join(map(repr, get_args(hint)))}",
                    "choose one of them")  # fmt: skip
            continue
        kinds = [
            get_origin(kind) or kind for kind in (get_args(hint) if get_origin(hint) is not dict else ()) or (hint,)
        ]
        if float in kinds and type(value) is int:
            object.__setattr__(config, name, float(value))
            continue
        right = any(
            type(value) is kind or (kind not in (int, bool, float) and isinstance(value, kind)) for kind in kinds
        )
        expected = " or ".join(kind.__name__.replace("NoneType", "nothing") for kind in kinds)
        _within(name, value, right, f"be {expected}", "see its description for the default")
        finite = not isinstance(value, float) or math.isfinite(value)  # NaN would pass every comparison
        _within(name, value, finite or (name in _MAY_BE_INFINITE and value > 0), "be finite",
                "see its description for the default")  # fmt: skip


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under flat names.

    Example:
        >>> flattened({"seed": 1, "lora": {"rank": 2}})
        {'seed': 1, 'lora.rank': 2}
    """
    out: dict[str, Any] = {}
    for name, value in settings.items():
        out |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as flat names and plain values, which is what trackers take."""
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in flattened(settings).items()}

"""Settings of a training run, checked at construction.

Each setting is one field: its name, type, bound, default and, below it, its meaning. A bound is written in the type as
``Annotated[float, positive("remedy")]``; :func:`check_fields` applies every type and bound. Rules that relate several
settings are in ``PPOConfig._check_combinations``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

from rl.errors import ConfigError

Entry = Literal["advantage", "reward", "potential"]
Shape = Literal["top_q", "bottom_q", "only_top", "soft", "raw"]
Sign = Literal["all", "non_negative", "negative", "asymmetric", "rule"]
Normalize = Literal["none", "mean", "sum_of_squares"]
Scope = Literal["reasoning", "response"]
AdvantageKind = Literal["gae", "group", "rloo"]
Aggregation = Literal["token_mean", "seq_mean", "dr_grpo"]
KLPlace = Literal["reward", "loss"]
KLEstimator = Literal["k3", "k2"]
Truncated = Literal["keep", "mask", "bootstrap"]
LRSchedule = Literal[
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]

OWN_SCHEDULES = ("constant", "linear", "cosine")
"""Schedules that are computed here; the others are those of transformers."""


# Bounds -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The interval of a setting, with the words of its error message.

    Attributes:
        rule: the rule, as the message states it after "must".
        remedy: the last part of the message.
        least: the smallest value.
        most: the greatest value.
        open_below: ``least`` itself is invalid.
        open_above: ``most`` itself is invalid.
        allow_infinite: infinity is valid; it turns a limit off.
    """

    rule: str
    remedy: str
    least: float = -math.inf
    most: float = math.inf
    open_below: bool = False
    open_above: bool = False
    allow_infinite: bool = False

    def contains(self, value: float) -> bool:
        """Tell whether the value lies in the interval."""
        if self.open_below and value == self.least:
            return False
        if self.open_above and value == self.most:
            return False
        return self.least <= value <= self.most


def positive(remedy: str, *, allow_infinite: bool = False) -> Bound:
    """Require a value above 0."""
    return Bound(rule="be positive", remedy=remedy, least=0, open_below=True, allow_infinite=allow_infinite)


def at_least(least: int, remedy: str, *, allow_infinite: bool = False) -> Bound:
    """Require a value of ``least`` or more."""
    return Bound(rule=f"be at least {least}", remedy=remedy, least=least, allow_infinite=allow_infinite)


def above(least: int, remedy: str) -> Bound:
    """Require a value greater than ``least``."""
    return Bound(rule=f"be above {least}", remedy=remedy, least=least, open_below=True)


def in_unit_interval(remedy: str, *, open_below: bool = False) -> Bound:
    """Require a value in [0, 1], or in (0, 1]."""
    interval = "(0, 1]" if open_below else "[0, 1]"
    return Bound(rule=f"lie in {interval}", remedy=remedy, least=0, most=1, open_below=open_below)


def below_one(remedy: str) -> Bound:
    """Require a value in [0, 1)."""
    return Bound(rule="lie in [0, 1)", remedy=remedy, least=0, most=1, open_above=True)


def between(least: int, most: int, remedy: str) -> Bound:
    """Require a value from ``least`` to ``most``."""
    return Bound(rule=f"be from {least} to {most}", remedy=remedy, least=least, most=most)


def int64(remedy: str) -> Bound:
    """Require an integer that 64 bits can hold."""
    return Bound(rule="be an integer of 64 bits", remedy=remedy, least=-(2**63), most=2**63 - 1)


_SEE_DEFAULTS = "see PPOConfig for defaults"
_ZERO_IS_OFF = "0 turns it off"
_OMIT_IS_OFF = "leave it out to turn it off"
_UNIT_DEFAULTS = "1 and 0.95 are the defaults"


_INT64 = int64("see its description for the default")
_SHOWN_BITS = 128
"""Integers up to this size are written out in messages."""


# Settings -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """The credit of tokens. The defaults are those of FlowTracer (arXiv 2606.10646): the top 40 % times 1.5."""

    rule: str = "flow"
    """Name of a rule in the registry; ``flowgraph-rl rules`` lists them."""

    shape: Shape = "top_q"
    """How scores become weights: ``"top_q"`` (``strength`` on the top ``share`` of scored tokens, 1 elsewhere),
    ``"bottom_q"`` (the control), ``"only_top"`` (1 on the top share, 0 on the other scored tokens), ``"soft"``
    (``clip(s / mean(s), floor, ceiling)``) or ``"raw"`` (the scores themselves)."""

    entry: Entry = "advantage"
    """Where credit enters: ``"advantage"`` (multiply the policy loss), ``"reward"`` (spread the outcome reward over
    tokens) or ``"potential"`` (potential-based shaping by cumulative score). The last two need ``advantage="gae"``."""

    share: Annotated[float, in_unit_interval("0.4 is the paper's", open_below=True)] = 0.4
    """q: chosen fraction of the scored tokens of each response."""

    strength: Annotated[float, positive("1.5 is the paper's, 1 changes nothing")] = 1.5
    """gamma: weight of the chosen tokens."""

    floor: Annotated[float, in_unit_interval("0.25 is the default")] = 0.25
    """Smallest weight of the soft shape; 0.5 with a ceiling of 2 starves no token and is recommended."""

    ceiling: Annotated[float, at_least(1, "4 is the default", allow_infinite=True)] = 4.0
    """Greatest weight of the soft shape."""

    sign: Sign = "rule"
    """Advantages that are weighted: ``"all"``, ``"non_negative"`` (weight 1 on negative advantages), ``"negative"``
    (weight 1 on the others), ``"asymmetric"`` (``w`` on non-negative advantages, ``1 / w`` on negative ones), or
    ``"rule"``: what the rule is registered with, ``"all"`` unless its paper restricts it."""

    normalize: Normalize = "none"
    """Divide the weights of the tokens that compete, for each response: ``"mean"`` (by their mean) or
    ``"sum_of_squares"`` (by the root of their mean square), so that no rule takes a larger step than another."""

    mean_one: bool = False
    """The same as ``normalize="mean"``."""

    fallback: Annotated[float, at_least(0, "0.5 is recommended, 0 turns it off")] = 0.0
    """Weights of 1 in a response whose answer is tied to nothing: where the mean unnormalised reach of the tokens
    before the answer is below this share of the batch's mean. Only rules that measure reach have it; 0: off."""

    anneal: Annotated[float, in_unit_interval("0.5 is usual, 0 turns it off")] = 0.0
    """Share of the run after which all weights are 1; until then ``w - 1`` shrinks linearly. 0: off."""

    scope: Scope = "reasoning"
    """Tokens that compete: ``"reasoning"`` (those before the answer) or ``"response"`` (these and the answer). Tokens
    after the answer, such as the end token, never compete and keep weight 1; without an answer every token competes."""

    potential_scale: Annotated[float, at_least(0, "1 is the default")] = 1.0
    """Total height of the potential for ``entry="potential"``, in units of reward."""

    layers: str = "middle"
    """Layers whose attention is read."""

    heads: str = "mean"
    """How the heads of a layer are aggregated."""

    rows: Literal["emission", "literal"] = "emission"
    """The attention row that belongs to a token: ``"emission"`` or ``"literal"`` (see the method page)."""

    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the rule itself."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mean_one and self.normalize == "sum_of_squares":
            raise broken_rule(
                "normalize", "be 'none' or 'mean' with mean_one=True", self.normalize, "leave mean_one out"
            )
        # The other entry points use the scores and no weights, so these settings would have no effect.
        for name in ("anneal", "fallback"):
            value = getattr(self, name)
            if value > 0 and self.entry != "advantage":
                raise broken_rule(
                    name, f"be 0 with entry={self.entry!r}, which uses no weights", value, "use entry='advantage'"
                )

    @classmethod
    def recommended(cls) -> Self:
        """Return the setting to start from: reach on sharpened attention, soft weights from 0.5 to 2, with a fallback.

        Example:
            >>> CreditConfig.recommended().rule
            'reach_sharp'
        """
        return cls(rule="reach_sharp", shape="soft", floor=0.5, ceiling=2.0, fallback=0.5)

    @property
    def normalization(self) -> Normalize:
        """Return how weights are normalised, ``mean_one`` included."""
        return "mean" if self.mean_one else self.normalize


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The shape of the adapters; the policy's and the critic's are alike."""

    rank: Annotated[int, at_least(1, "16 is the default")] = 16
    """r: inner dimension of an update."""

    alpha: Annotated[float, positive("twice the rank is the default")] = 32.0
    """Updates are scaled by ``alpha / rank``."""

    targets: str | list[str] = "all-linear"
    """Layers with an adapter: ``"all-linear"`` (all but the output layer), names of linear layers as a list or with
    commas between them, or a regular expression for their complete names, such as ``".*\\.[0-9]\\.mlp\\..*"``."""

    def __post_init__(self) -> None:
        check_fields(self, prefix="lora.")
        if not self.targets:
            raise broken_rule("lora.targets", "name at least one layer", self.targets, "use 'all-linear'")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """One training run."""

    # Rollouts.

    steps: Annotated[int, at_least(1, _SEE_DEFAULTS)] = 100
    """Number of steps; each is one rollout and its updates."""

    num_prompts: Annotated[int, at_least(1, _SEE_DEFAULTS)] = 8
    """Problems of a step, over all processes."""

    group_size: Annotated[int, at_least(1, _SEE_DEFAULTS)] = 4
    """G: responses to each problem."""

    max_prompt_tokens: Annotated[int, at_least(1, _SEE_DEFAULTS)] = 512
    """Longest prompt; a longer one is an error."""

    max_response_tokens: Annotated[int, at_least(1, _SEE_DEFAULTS)] = 256
    """Longest response; a longer one is truncated."""

    temperature: Annotated[float, positive(_SEE_DEFAULTS)] = 1.0
    """Temperature of sampling and of every log-probability."""

    generation_batch_size: Annotated[int | None, positive(_OMIT_IS_OFF)] = None
    """Responses generated at a time; None: all those of a process."""

    stop_strings: str | list[str] | tuple[str, ...] = ()
    """Texts that end a response, beside the end tokens; the response includes them."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options of the chat template, such as ``{"enable_thinking": False}``."""

    merge_for_generation: bool = True
    """Generate from weights that include the adapter. This is faster and needs a copy of the adapted weights; the
    base weights are bit-identical afterwards."""

    # Advantages.

    advantage: AdvantageKind = "gae"
    """Estimator: ``"gae"`` (with a critic), ``"group"`` (reward minus the mean of its group) or ``"rloo"`` (reward
    minus the mean of the others in its group)."""

    discount: Annotated[float, in_unit_interval(_UNIT_DEFAULTS)] = 1.0
    """gamma of GAE."""

    gae_lambda: Annotated[float, in_unit_interval(_UNIT_DEFAULTS)] = 0.95
    """lambda of GAE."""

    scale_group_std: bool = True
    """Divide group advantages by their standard deviation (GRPO) or not (Dr. GRPO)."""

    whiten: bool = True
    """Normalise GAE advantages over the batch."""

    # Losses.

    clip: Annotated[float, positive(_SEE_DEFAULTS)] = 0.2
    """epsilon below a ratio of 1, and above it unless ``clip_high`` is given."""

    clip_high: Annotated[float | None, positive(_OMIT_IS_OFF)] = None
    """epsilon above a ratio of 1; None: ``clip``."""

    dual_clip: Annotated[float | None, above(1, "3 is usual")] = None
    """c: bound on the loss of negative advantages; None: no bound."""

    value_clip: Annotated[float | None, positive(_OMIT_IS_OFF)] = 0.2
    """Clip range of value predictions, in units of reward; None: not clipped."""

    value_coefficient: Annotated[float, at_least(0, _ZERO_IS_OFF)] = 0.1
    """Weight of the value loss."""

    kl_coefficient: Annotated[float | None, at_least(0, _ZERO_IS_OFF)] = None
    """beta: weight of the KL penalty; None: 0.05 with a critic, 0 without."""

    kl_in: KLPlace = "reward"
    """Where the penalty enters: ``"reward"`` (k1 at each token; only ``gae`` keeps it per token) or ``"loss"``."""

    kl_estimator: KLEstimator = "k3"
    """Value of a KL in the loss: ``"k3"`` (times the importance ratio; its mean is the KL) or ``"k2"``. The gradient of
    both is that of the KL, see :func:`rl.kl_loss`."""

    kl_target: Annotated[float | None, positive(_OMIT_IS_OFF)] = None
    """KL of a response, in nats, that beta is adapted to; None: beta is fixed."""

    entropy_coefficient: Annotated[float, at_least(0, _ZERO_IS_OFF)] = 0.0
    """Weight of the entropy bonus."""

    sampling_correction: Annotated[float | None, at_least(1, "2 is usual; leave it out to turn it off")] = None
    """C: multiply the policy loss of each token by ``min(pi_old / pi_sampled, C)``, the ratio of its probabilities in
    scoring and in generation, which differ in 16 bits (truncated importance sampling); None: off."""

    aggregation: Aggregation = "token_mean"
    """Mean over a minibatch: ``"token_mean"``, ``"seq_mean"`` or ``"dr_grpo"``."""

    truncated: Truncated = "keep"
    """Treatment of truncated responses: ``"keep"``, ``"mask"`` (excluded from the losses) or ``"bootstrap"`` (the
    critic's value replaces the missing rest; needs ``gae``)."""

    missing_eos_penalty: Annotated[float, at_least(0, _ZERO_IS_OFF)] = 0.0
    """Subtracted from the reward of a truncated response."""

    # Optimisation.

    epochs: Annotated[int, at_least(1, _SEE_DEFAULTS)] = 1
    """Passes over each rollout."""

    num_minibatches: Annotated[int, at_least(1, _SEE_DEFAULTS)] = 1
    """Optimizer updates in an epoch."""

    micro_batch_size: Annotated[int, at_least(1, _SEE_DEFAULTS)] = 32
    """Sequences in a forward pass; changes memory and speed, never the result."""

    gradient_checkpointing: bool = False
    """Keep only the inputs of each layer for the backward pass and recompute the rest there: much less memory for one
    more forward pass, and the same result."""

    learning_rate: Annotated[float, positive(_SEE_DEFAULTS)] = 1e-4
    """Learning rate of the policy's adapter."""

    value_learning_rate: Annotated[float | None, positive(_OMIT_IS_OFF)] = None
    """Learning rate of the critic's adapter and head; None: ``learning_rate``."""

    lr_schedule: LRSchedule = "constant"
    """Schedule after the warm-up: ``"constant"``, ``"linear"`` or ``"cosine"``, or any other that ``get_scheduler`` of
    transformers knows, as it computes it from ``warmup_steps`` and ``steps``. ``"reduce_lr_on_plateau"`` and
    ``"greedy"`` follow the reward of the evaluations, or that of the steps where there are none."""

    lr_schedule_options: dict[str, Any] = field(default_factory=dict)
    """``scheduler_specific_kwargs`` of a schedule of transformers, such as ``{"min_lr_rate": 0.1}``. A minimum rate is
    that of ``learning_rate``; the critic's rate is scaled alike."""

    warmup_steps: Annotated[int, at_least(0, _ZERO_IS_OFF)] = 0
    """Steps of linear warm-up."""

    adam_beta1: Annotated[float, below_one("0.9 is the default")] = 0.9
    """Decay of the mean gradient in Adam."""

    adam_beta2: Annotated[float, below_one("0.999 is the default")] = 0.999
    """Decay of the mean squared gradient in Adam."""

    adam_epsilon: Annotated[float, positive("1e-5 is the default")] = 1e-5
    """Added to the root of the mean squared gradient in Adam."""

    weight_decay: Annotated[float, at_least(0, _ZERO_IS_OFF)] = 0.0
    """Decoupled weight decay (AdamW), times the learning rate, of all trained weights."""

    max_grad_norm: Annotated[float, positive(_SEE_DEFAULTS, allow_infinite=True)] = 1.0
    """Greatest gradient norm, separate for policy and critic."""

    # Evaluation.

    evaluate_every: Annotated[int, at_least(0, _ZERO_IS_OFF)] = 0
    """Steps between evaluations on held-out problems (the task's split ``"eval"``); 0: none. The policy of the best is
    kept in the folder ``best``."""

    evaluation_problems: Annotated[int, at_least(1, _SEE_DEFAULTS)] = 64
    """Problems of an evaluation, the same in each."""

    evaluation_samples: Annotated[int, at_least(1, _SEE_DEFAULTS)] = 1
    """Responses to each of them."""

    evaluation_temperature: Annotated[float, at_least(0, "0 is greedy decoding")] = 0.0
    """Temperature of an evaluation; 0: greedy decoding."""

    patience: Annotated[int | None, positive(_OMIT_IS_OFF)] = None
    """Evaluations in a row without a new best reward after which the run stops; None: it never stops early."""

    # The run.

    seed: Annotated[int, int64("0 is the default")] = 0
    """Seed of every random draw."""

    save_every: Annotated[int, at_least(0, _ZERO_IS_OFF)] = 50
    """Steps between checkpoints; 0: only the last step."""

    save_every_updates: Annotated[int | None, positive(_OMIT_IS_OFF)] = None
    """Optimizer updates between checkpoints inside a step, which include the rollout; None: none."""

    keep_checkpoints: Annotated[int, at_least(1, _SEE_DEFAULTS)] = 2
    """Number of checkpoints that are kept."""

    report_every: Annotated[int, at_least(0, _ZERO_IS_OFF)] = 0
    """Steps between rollout files for the token-credit report; 0: none."""

    credit: CreditConfig = field(default_factory=CreditConfig)
    """Credit of tokens, see :class:`CreditConfig`."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    """Shape of the adapters, see :class:`LoraConfig`."""

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "stop_strings", stop_string_list(self.stop_strings))
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Check the rules that relate several settings."""
        num_responses = self.num_prompts * self.group_size
        if num_responses % self.num_minibatches != 0:
            raise broken_rule(
                "num_minibatches",
                f"divide the {num_responses} responses of a step",
                self.num_minibatches,
                "change num_prompts or group_size",
            )
        if not self.has_critic:
            self._check_without_critic()
        self._check_schedule()
        self._check_evaluation()
        if self.kl_target is not None and self.kl_weight == 0:
            raise broken_rule(
                "kl_target",
                "come with a positive kl_coefficient to start from",
                self.kl_target,
                "set kl_coefficient=0.05",
            )

    def _check_without_critic(self) -> None:
        """Check what estimators that compare the total rewards of a group cannot do."""
        estimator = f"advantage={self.advantage!r}"
        if self.group_size < 2:
            raise broken_rule(
                "group_size",
                f"be at least 2 for {estimator}, which compares responses of one prompt",
                self.group_size,
                "use group_size=4, or advantage='gae'",
            )
        if self.credit.entry != "advantage":
            raise broken_rule(
                "credit.entry",
                f"be 'advantage' with {estimator}, which sums the rewards of a response and so ignores their position",
                self.credit.entry,
                "use entry='advantage', or advantage='gae'",
            )
        if self.truncated == "bootstrap":
            raise broken_rule(
                "truncated",
                f"be 'keep' or 'mask' with {estimator}, which has no critic to bootstrap from",
                self.truncated,
                "use advantage='gae'",
            )

    def _check_schedule(self) -> None:
        """Check that options are given only to a schedule that takes some."""
        if self.lr_schedule_options and self.lr_schedule in OWN_SCHEDULES:
            raise broken_rule(
                "lr_schedule_options",
                f"be empty with lr_schedule={self.lr_schedule!r}, which has none",
                self.lr_schedule_options,
                "leave it out, or use a schedule of transformers such as 'cosine_with_min_lr'",
            )

    def _check_evaluation(self) -> None:
        """Check the rules that relate the settings of evaluations."""
        if self.evaluation_samples > 1 and self.evaluation_temperature == 0:
            raise broken_rule(
                "evaluation_samples",
                "be 1 with evaluation_temperature=0: greedy samples are all the same",
                self.evaluation_samples,
                "set evaluation_temperature=1",
            )
        if self.patience is not None and self.evaluate_every == 0:
            raise broken_rule(
                "patience",
                "come with evaluations, which it counts",
                self.patience,
                "set evaluate_every=10",
            )

    @property
    def kl_weight(self) -> float:
        """Return beta, with its default filled in."""
        if self.kl_coefficient is not None:
            return self.kl_coefficient
        return 0.05 if self.has_critic else 0.0

    @property
    def has_critic(self) -> bool:
        """Tell whether the advantages need a value function."""
        return self.advantage == "gae"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON and YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Build a config from plain values, as YAML gives them.

        Args:
            settings: values by name. ``credit`` and ``lora`` are mappings; ``credit`` may also be the name of a rule.

        Raises:
            ConfigError: an unknown name, a value of another type, or one that breaks a rule.

        Example:
            >>> PPOConfig.from_dict({"steps": 3, "credit": "entropy"}).credit.rule
            'entropy'
        """
        values = dict(settings)
        credit = values.get("credit")
        if isinstance(credit, str):
            values["credit"] = CreditConfig(rule=credit)
        elif isinstance(credit, Mapping):
            values["credit"] = _from_names(CreditConfig, credit, prefix="credit.")
        lora = values.get("lora")
        if isinstance(lora, Mapping):
            values["lora"] = _from_names(LoraConfig, lora, prefix="lora.")
        return _from_names(cls, values)


def _from_names(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Construct a config class; an unknown name is an error that lists the known ones."""
    names = [item.name for item in fields(kind)]
    for name in values:
        if name not in names:
            raise ConfigError(
                f"{prefix}{name}: must be a setting of {kind.__name__}, got an unknown name; "
                f"there are {', '.join(names)}"
            )
    return kind(**values)


# Checks -------------------------------------------------------------------------------------------------


class _FieldRule(NamedTuple):
    """What the declaration of a field requires of its value.

    Attributes:
        name: of the field.
        choices: the valid values of a ``Literal``; empty for other types.
        types: the valid types; empty for a ``Literal``.
        bound: the interval; None: not bounded.
    """

    name: str
    choices: tuple[Any, ...]
    types: tuple[type, ...]
    bound: Bound | None


@cache
def _field_rules(kind: type) -> list[_FieldRule]:
    """Read the rules of a config class from its type hints."""
    rules = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        bound = None
        if get_origin(hint) is Annotated:
            hint, bound = get_args(hint)
        origin = get_origin(hint)
        if origin is Literal:
            rules.append(_FieldRule(name, get_args(hint), (), bound))
            continue
        # A union has its members as arguments; ``dict[str, Any]`` has arguments, but is one type.
        members = (hint,)
        if origin is not None and origin is not dict:
            members = get_args(hint)
        types = tuple(get_origin(member) or member for member in members)
        rules.append(_FieldRule(name, (), types, bound))
    return rules


def check_fields(config: Any, prefix: str = "") -> None:
    """Check every field of a config dataclass for its type, finiteness and bound.

    Integers are converted where floats belong, so that ``1`` and ``1.0`` are the same setting.

    Args:
        config: an instance of a frozen dataclass whose fields declare their bounds.
        prefix: put before the names in messages, such as ``"lora."``.

    Raises:
        ConfigError: a field breaks a rule.
    """
    for rule in _field_rules(type(config)):
        name = prefix + rule.name
        value = getattr(config, rule.name)
        if rule.choices:
            if value not in rule.choices:
                choices = ", ".join(map(repr, rule.choices))
                raise broken_rule(name, f"be one of {choices}", value, "choose one of them")
            continue

        if float in rule.types and type(value) is int:
            try:
                value = float(value)
            except OverflowError as error:
                raise broken_rule(name, "be finite", value, "see its description for the default") from error
            object.__setattr__(config, rule.name, value)
        if not _has_type(value, rule.types):
            expected = " or ".join(kind.__name__.replace("NoneType", "nothing") for kind in rule.types)
            raise broken_rule(name, f"be {expected}", value, "see its description for the default")

        # NaN would pass some comparisons, and infinity an interval without an upper end.
        if isinstance(value, float) and not math.isfinite(value):
            is_valid_infinity = value == math.inf and rule.bound is not None and rule.bound.allow_infinite
            if not is_valid_infinity:
                raise broken_rule(name, "be finite", value, "see its description for the default")
        if rule.bound is not None and value is not None and not rule.bound.contains(value):
            raise broken_rule(name, rule.bound.rule, value, rule.bound.remedy)

        # Larger integers overflow in the libraries below, in places that do not name the setting.
        if type(value) is int and not _INT64.contains(value):
            raise broken_rule(name, _INT64.rule, value, "see its description for the default")


def _has_type(value: Any, types: tuple[type, ...]) -> bool:
    """Tell whether a value has one of the types; numbers must match exactly, because a bool is also an int."""
    exact = (int, bool, float)
    for kind in types:
        if type(value) is kind:
            return True
        if kind not in exact and isinstance(value, kind):
            return True
    return False


def stop_string_list(given: str | Sequence[str]) -> list[str]:
    """Return stop strings as a list; one text alone is a list of one.

    Raises:
        ConfigError: an empty text, or something else than texts.

    Example:
        >>> stop_string_list("</answer>")
        ['</answer>']
    """
    texts = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(text, str) and text for text in texts):
        raise broken_rule(
            "stop_strings", "be texts of at least one character", texts, "use ['</answer>'], or leave it out"
        )
    return texts


def broken_rule(name: str, rule: str, value: Any, remedy: str) -> ConfigError:
    """Build the error of a setting that breaks a rule."""
    return ConfigError(f"{name}: must {rule}, got {shown(value)}; {remedy}")


def shown(value: Any) -> str:
    """Return the text of a value for a message; Python refuses to write an integer of thousands of digits.

    Example:
        >>> shown(0.5), shown(10**400)
        ('0.5', 'an integer of 1329 bits')
    """
    if type(value) is int and value.bit_length() > _SHOWN_BITS:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


# Comparison and logging ---------------------------------------------------------------------------------


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the settings in which two configurations differ, as ``name: one -> other``.

    Example:
        >>> differences({"seed": 1, "lora": {"rank": 2}}, {"seed": 1, "lora": {"rank": 4}})
        ['lora.rank: 2 -> 4']
    """
    found = []
    for name in sorted(one.keys() | other.keys()):
        before = one.get(name, "(none)")
        after = other.get(name, "(none)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return found


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under flat names.

    Example:
        >>> flattened({"seed": 1, "lora": {"rank": 2}})
        {'seed': 1, 'lora.rank': 2}
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings as flat names and plain values, which is what trackers accept."""
    plain: dict[str, Any] = {}
    for name, value in flattened(settings).items():
        is_plain = isinstance(value, int | float | str | bool)
        plain[name] = value if is_plain else str(value)
    return plain

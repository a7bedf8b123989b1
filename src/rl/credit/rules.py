"""The rules of the package: importing this module registers them all."""

from rl.credit.attention_rules import atpo, correlation, coupled, fai, max_attention, waad
from rl.credit.flow_rules import flow, flow_entropy, reach, reach_entropy, shuffled_flow
from rl.credit.policy_rules import entropy, gradient, oracle, random, uniform

__all__ = [
    "atpo",
    "correlation",
    "coupled",
    "entropy",
    "fai",
    "flow",
    "flow_entropy",
    "gradient",
    "max_attention",
    "oracle",
    "random",
    "reach",
    "reach_entropy",
    "shuffled_flow",
    "uniform",
    "waad",
]

"""Token credit: rules that say which tokens of a response matter, in a registry that is open to everyone."""

from rl.credit import rules as _rules  # noqa: F401  (its rules are there before anyone registers another)
from rl.credit.registry import AttentionNeed, CreditInput, credit_rule, find_rule, rule_names

__all__ = ["AttentionNeed", "CreditInput", "credit_rule", "find_rule", "rule_names"]

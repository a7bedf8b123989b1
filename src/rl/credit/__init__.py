"""Token credit: rules, their registry, scopes, the scoring pass, and weights.

Importing this package registers the rules that ship with it.
"""

from rl.credit import attention_rules, flow_rules, paper_rules, policy_rules, sharp_rules

__all__ = ["attention_rules", "flow_rules", "paper_rules", "policy_rules", "sharp_rules"]

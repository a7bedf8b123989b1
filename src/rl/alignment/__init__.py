"""Compare credit rules by the policy gradients they produce."""

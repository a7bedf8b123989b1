"""Reward on held-out problems, with intervals."""

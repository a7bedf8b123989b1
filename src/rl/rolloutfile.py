"""Rollout files."""

from rl.report import load_rollout, save_rollout, token_texts

__all__ = ["load_rollout", "save_rollout", "token_texts"]

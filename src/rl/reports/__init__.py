"""The token-credit page of a rollout."""

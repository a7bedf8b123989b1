"""The model being trained: actor-critic, sampling, loading."""

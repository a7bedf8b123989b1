"""Credit as a service: requests, batches of similar length, the scoring of a batch, and the Ray Serve deployment.

Everything but :mod:`rl.serving.ray_deployment` runs without Ray.
"""

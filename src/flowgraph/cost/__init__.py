"""Estimate the FLOPs, memory traffic and time of capture and solve beside a training step."""

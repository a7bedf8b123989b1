"""Measurements on one GPU: correctness, cost of credit, long texts, batches, sampling noise and a kernel profile."""

"""The sections in the order in which they run, with their parts of the time."""

from __future__ import annotations

from benchmarks.gpu import batches, correctness, credit, kernel_profile, long_trace, sampling_noise
from benchmarks.gpu.run import Section

SECTIONS: tuple[Section, ...] = (
    Section("correctness", "the device against the CPU and against eager attention", correctness.run, 80, 15),
    Section("credit", "token credit as a share of a training step, Qwen3-4B's shape", credit.run, 170, 40),
    Section("profile", "kernels of one recorded forward pass and its solve", kernel_profile.run, 40, 15),
    Section("noise", "the sampler's noise against multinomial", sampling_noise.run, 20, 5),
    Section("batches", "batches of graphs and matrices against one read", batches.run, 60, 15),
    Section("trace", "one long text against the plain forward pass", long_trace.run, 110, 20),
)
"""Shares are seconds of the default budget of 480; time that a section leaves goes to the others."""

"""Matplotlib figures of traces and comparisons."""

"""Trace every line of a JSONL file: batched, resumable, with result tables."""

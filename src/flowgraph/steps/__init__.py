"""Merge tokens into lines, sentences or numbered steps and keep the flow exact."""

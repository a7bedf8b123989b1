"""Capture attention rows from one forward pass of a causal LM, or mask them."""

"""Knock tokens, edges and routes out of the attention and measure the answer."""

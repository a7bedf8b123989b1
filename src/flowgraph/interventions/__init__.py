"""Mask tokens, edges or routes in the model and measure the answer."""

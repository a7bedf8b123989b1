"""Exact max flow and min cut by igraph, re-verified."""

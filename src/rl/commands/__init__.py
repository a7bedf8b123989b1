"""One module per command of flowgraph-rl."""

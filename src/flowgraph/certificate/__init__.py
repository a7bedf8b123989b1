"""Check every provable property of a flow against the edges, the max flow and exact fractions."""

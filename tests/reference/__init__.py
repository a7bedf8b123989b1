"""The slow, obvious twins of the library: exact fractions, plain loops, the formulas of the method."""

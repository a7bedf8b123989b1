"""Which explanations find a known or measured truth."""

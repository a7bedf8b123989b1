"""To the tools people already use, and back."""

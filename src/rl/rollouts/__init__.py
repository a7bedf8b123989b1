"""From problems to scored responses, and their file."""

"""Prompt and response as tokens with character spans, and the question, reasoning and answer regions."""

"""Adapters that bring token credit into other trainers."""

"""Token credit inside other trainers."""

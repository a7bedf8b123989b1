"""Align two traces and measure how far their flows agree."""

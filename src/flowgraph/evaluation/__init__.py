"""Decide which explanation is right: tasks with known or measured truth, methods, controls, and tables of results."""

"""Expands a recipe into cells, runs them in isolated processes, and records the results."""

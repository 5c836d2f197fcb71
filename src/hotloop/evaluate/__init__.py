"""Measures quality: perplexity, divergence from a reference, tasks, and their statistics."""

"""Quality: perplexity, divergence from a reference, and their statistics."""

"""Tensor parallelism: who holds what, how ranks compute together, how they start and end."""

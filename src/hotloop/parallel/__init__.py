"""Tensor parallelism: shards, collectives, and the processes of ranks."""

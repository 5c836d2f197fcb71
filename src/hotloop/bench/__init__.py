"""Workload, clock and memory: one engine in, one measurement out."""

"""Measures the speed and memory of an engine on a workload."""

"""Kernels: a plain-torch reference for each of them, and faster implementations."""

"""Prefill, decode, sampling and batching slots: the LLM."""

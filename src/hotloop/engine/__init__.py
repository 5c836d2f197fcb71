"""The LLM: scheduling, prefill, decode, sampling and speculation."""

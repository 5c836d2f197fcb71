"""The decoder, and the model families that configure it."""

"""Quantized tensors and the schemes that make them."""

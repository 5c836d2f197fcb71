"""From files to a loaded model: read, quantize, pack, assign."""

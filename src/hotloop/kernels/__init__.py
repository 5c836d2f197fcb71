"""The arithmetic: a plain-torch reference for every kernel, and the faster ones."""

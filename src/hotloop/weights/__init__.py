"""Loads a model from files: reads, quantizes, packs and assigns weights."""

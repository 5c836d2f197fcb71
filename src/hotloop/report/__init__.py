"""Turns records into tables and a recommendation."""

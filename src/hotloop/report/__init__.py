"""Records become tables and a recommendation."""

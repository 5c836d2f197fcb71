"""A recipe becomes cells, isolated processes, and records."""

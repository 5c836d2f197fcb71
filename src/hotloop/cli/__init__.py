"""The hotloop command: one module per verb."""

"""One decoder, configured; the families that configure it."""

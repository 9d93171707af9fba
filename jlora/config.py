"""The one table of settings (being written)."""

"""Using a model: decoding, and what it does on held-out rows."""

"""Decoding, and evaluation on held-out rows; the model is an argument."""

"""Quantized weights as pytrees: codebooks, NF4 and FP4, int8, and quantizing a parameter tree."""

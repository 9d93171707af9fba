"""Quantized weights as pytrees: code tables, NF4 and FP4, int8, and which leaves of a tree."""

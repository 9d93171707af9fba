"""Kernels that are tested but selected by no setting: nothing in the package imports them."""

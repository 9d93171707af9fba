"""Devices and processes: the mesh, the layout of every leaf, signals and locks."""

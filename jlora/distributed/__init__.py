"""Devices and processes: the mesh, how arrays are sharded over it, locks and signals."""

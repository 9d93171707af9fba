"""How a table of settings becomes typed, checked, read from YAML and shown as help."""

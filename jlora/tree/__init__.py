"""Parameter trees: names of leaves and modules, PEFT's rules for matching them, fingerprints."""

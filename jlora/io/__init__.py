"""Reading and writing models, adapters and checkpoints."""

"""Files of models, adapters and checkpoints."""

"""The training step, its state and the optimizers; the model is an argument."""

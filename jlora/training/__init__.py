"""Training without models: the step, its state and optimizers."""

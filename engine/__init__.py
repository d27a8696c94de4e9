"""Training: settings, masks, dictionaries, activation streams, checkpoints, and the embedded language model."""

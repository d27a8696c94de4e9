"""What trains: configs, masks, the dictionary, streams of activations, checkpoints, the embedded language model."""

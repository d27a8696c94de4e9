"""Synthetic worlds: activations made of known features, so that dictionaries can be scored against the truth."""

"""Evals: metrics of a dictionary and its controls on held-out text."""

"""What a dictionary is worth: measured on held-out text, beside its controls."""

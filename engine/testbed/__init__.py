"""The embedded language: its generator knows every token's labels and its own entropy; a small model has learned it."""

"""The embedded language, whose generator knows every token's labels and the exact entropy, and a small model of it."""

"""Services of the running process: progress, signals, memory, timing, and access to the hub."""

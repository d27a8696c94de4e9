"""The process that a command runs in: progress, signals, memory, time, and whether the hub can be reached."""

"""What is kept on disk: run folders, checkpoints, and files that are written whole, locked and checked."""

"""Storage on disk: run folders, checkpoints, atomic writes, locks and checksums."""

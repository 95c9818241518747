"""Checkpoints on disk: layout, saving and restoring, pruning, descriptions."""

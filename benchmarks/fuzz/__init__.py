"""Hostile media, checkpoints and adapters: a right vector or one sentence for each."""

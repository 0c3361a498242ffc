"""Saving and loading checkpoints, synchronously or in the background."""

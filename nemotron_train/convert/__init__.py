"""Checkpoint conversion: merging checkpoints, export to and import from Hugging Face."""

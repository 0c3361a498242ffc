"""Checkpoints to other checkpoints: merged, and to and from Hugging Face."""

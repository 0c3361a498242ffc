"""Checkpoints to other checkpoints. Imports the core; the core never imports it."""

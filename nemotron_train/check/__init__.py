"""Proofs that a user runs on their own configuration: layouts, resume, precision."""

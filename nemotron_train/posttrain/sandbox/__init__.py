"""Runs code that a model wrote, without trusting it. No torch."""

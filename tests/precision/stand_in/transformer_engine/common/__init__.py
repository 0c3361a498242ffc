"""Holds `recipe`, as the real package does."""

from transformer_engine.common import recipe

__all__ = ["recipe"]

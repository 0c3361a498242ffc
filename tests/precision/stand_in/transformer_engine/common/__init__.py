"""Contains `recipe`, like the real package."""

from transformer_engine.common import recipe

__all__ = ["recipe"]

"""The attention layer: grouped queries, no positional embedding."""

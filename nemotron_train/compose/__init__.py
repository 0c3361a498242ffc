"""Recipes and overrides to a typed configuration. The only package that knows Hydra."""

"""Recipes and command-line overrides to a typed configuration. The only package that uses Hydra."""

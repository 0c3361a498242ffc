"""Precision: which format each matrix product is computed in."""

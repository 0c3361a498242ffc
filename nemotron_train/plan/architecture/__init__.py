"""The pattern as layers with shapes, parameters and FLOPs, and pipeline stages."""

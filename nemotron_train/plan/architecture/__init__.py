"""The layers of a pattern with shapes, parameters and FLOPs, and the pipeline stages."""

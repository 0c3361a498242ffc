"""The optimizer, its schedule, and operations on whole gradients and parameters."""

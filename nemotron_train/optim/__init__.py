"""The optimizer, the learning-rate schedule, and operations on whole gradients and parameters."""

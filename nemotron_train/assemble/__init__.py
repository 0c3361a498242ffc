"""Builds the Megatron-Core model: specs, transformer config, weights at the start."""

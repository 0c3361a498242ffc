"""Builds the Megatron-Core model: specs, transformer config, initial weights, recomputation."""

"""Fused operations. Megatron does not use them here."""

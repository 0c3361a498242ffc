"""Fused operations; Megatron uses none of them here."""

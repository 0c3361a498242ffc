"""Quantized storage. No tensor of the stand-in uses it."""


class QuantizedTensor:
    """Megatron checks for this type. It is never instantiated."""

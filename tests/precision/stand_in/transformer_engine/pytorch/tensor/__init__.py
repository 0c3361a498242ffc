"""Quantized storage: no tensor here is any."""


class QuantizedTensor:
    """Asked about by Megatron; never made."""

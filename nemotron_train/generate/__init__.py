"""Text from a checkpoint: decoding, sampling, speculative decoding with the MTP block."""

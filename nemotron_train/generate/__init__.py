"""Text generation from a checkpoint: decoding, sampling, MTP speculative decoding."""

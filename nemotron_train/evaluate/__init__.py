"""What a checkpoint is worth: loss on held-out data, loss by position, benchmarks."""

"""Evaluation of a checkpoint: held-out loss, loss by position, benchmarks, draft acceptance."""

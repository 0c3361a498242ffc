"""From text to batches: tokenizers, shards, manifests, blends, the resumable batch source.

No torch: batches are NumPy arrays.
"""

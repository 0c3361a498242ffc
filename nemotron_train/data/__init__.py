"""Text to batches: tokenizers, shards, manifests, blends and the resumable batch source.

Nothing in this package imports torch: batches are numpy arrays.
"""

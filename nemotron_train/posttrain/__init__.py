"""Post-training of a checkpoint: environments that judge answers, and what trains on them."""

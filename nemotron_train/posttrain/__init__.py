"""Post-training: fine-tuning on conversations, and environments that judge answers."""

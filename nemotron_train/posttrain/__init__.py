"""Post-training: supervised fine-tuning on conversations, through the trainer that pretrains."""

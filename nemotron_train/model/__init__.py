"""The model: its shape (no torch), its layers, and how they become a Megatron-Core model."""

"""The layers of the hybrid model, as modules for the slots of Megatron-Core."""

"""The machine: its device, its process groups, and what lets Megatron-Core run without a GPU."""

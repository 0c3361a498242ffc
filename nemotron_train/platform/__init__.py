"""The machine: device, process groups, files, and what Megatron-Core needs without a GPU."""

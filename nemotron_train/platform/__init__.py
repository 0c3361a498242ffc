"""The machine: device, process groups, files, and Megatron-Core adaptations for CPUs."""

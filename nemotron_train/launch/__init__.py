"""Starts runs: sweeps on this machine or as a job array, multi-node Slurm jobs. No torch."""

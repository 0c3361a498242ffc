"""Launches runs: sweeps (local or as a job array) and multi-node Slurm jobs. No torch."""

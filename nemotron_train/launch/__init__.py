"""Launches runs: ranks of one machine, sweeps, multi-node Slurm jobs. No torch."""

"""Sweeps: planning the cells of a grid and running them, locally or as a Slurm job array."""

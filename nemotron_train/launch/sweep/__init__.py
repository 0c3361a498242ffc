"""A grid of runs, on this machine or as one Slurm job array."""

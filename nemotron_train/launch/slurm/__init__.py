"""One multi-node Slurm job: rendered, checked, submitted, watched."""

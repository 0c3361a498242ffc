"""One multi-node Slurm job: check, render, submit, and show status."""

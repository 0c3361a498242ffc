"""Several processes from one command: sweeps on this machine."""

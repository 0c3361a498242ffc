"""Runs that are started for the user: sweeps here or on a cluster, multi-node jobs."""

"""Readers for run folders: metrics as columns, telemetry, timeline, run card."""

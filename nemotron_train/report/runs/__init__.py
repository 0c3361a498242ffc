"""Run folders as columns of numbers: metrics, telemetry, timeline, the run's card."""

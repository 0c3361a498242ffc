"""Supervision of a run: non-finite values, spikes, model health, stragglers, hangs."""

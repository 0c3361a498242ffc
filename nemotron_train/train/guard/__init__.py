"""What watches over a run: non-finite values, spikes, health, stragglers, hangs."""

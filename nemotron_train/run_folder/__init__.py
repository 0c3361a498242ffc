"""What a run folder holds and who may write to it. No torch."""

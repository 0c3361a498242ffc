"""The files of a run folder, and which process may write to it. No torch."""

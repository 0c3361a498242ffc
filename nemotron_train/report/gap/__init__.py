"""Loss gaps between paired runs: pairing, gaps, noise, verdicts."""

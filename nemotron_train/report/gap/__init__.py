"""Loss gaps between paired runs: pairs, gaps, noise, verdicts."""

"""Reports on runs: terminal tables, PNG plots, one HTML page. No torch."""

"""Analysis of a configuration before anything is built: checks, derived values, costs. No torch."""

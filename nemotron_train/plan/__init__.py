"""What follows from a configuration before anything is built. No torch."""

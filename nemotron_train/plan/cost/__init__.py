"""Memory and traffic of a rank, from the operators of each layer."""

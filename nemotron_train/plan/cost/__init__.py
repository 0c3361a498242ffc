"""Memory and communication of a rank, predicted from the operators of each layer."""

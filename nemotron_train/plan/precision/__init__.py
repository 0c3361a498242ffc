"""The precision plan: rules, resolved to a format for each matrix product of each linear."""

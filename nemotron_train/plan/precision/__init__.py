"""The precision plan: rules resolved to a format for each product of each linear."""

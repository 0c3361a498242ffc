"""Environments: the tasks that a policy is given, and exact judges of what it answers. No torch."""

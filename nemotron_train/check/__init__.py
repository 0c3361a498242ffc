"""Checks that users run on their own configuration: layout, resume and precision."""

"""The text of `plan`: layers, formats, memory, traffic, ranks, and why a knob is set."""

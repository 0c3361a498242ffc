"""Output of `plan`: layers, formats, memory, traffic, ranks, and what set a knob."""

"""The user configuration: every knob, the checks of single values, and the errors."""

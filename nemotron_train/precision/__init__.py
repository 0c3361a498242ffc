"""Low-precision numerics, and the modules that apply a precision plan."""

"""Low-precision numerics, and the modules that compute in a precision plan."""

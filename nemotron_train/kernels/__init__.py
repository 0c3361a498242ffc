"""C kernels for CPUs and the typed functions that call them. README.md lists all forms."""

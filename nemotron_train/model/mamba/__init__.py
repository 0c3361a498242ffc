"""The Mamba-2 layer: mixer, convolution, scan, gated norm."""

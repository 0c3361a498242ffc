"""PNG plots of runs and loss gaps. Matplotlib is imported only when a plot is drawn."""

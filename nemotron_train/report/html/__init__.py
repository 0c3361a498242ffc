"""One self-contained HTML page that shows one or more runs."""

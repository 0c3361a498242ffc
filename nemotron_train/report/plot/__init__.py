"""PNG pictures of runs and gaps (matplotlib, imported when a picture is drawn)."""

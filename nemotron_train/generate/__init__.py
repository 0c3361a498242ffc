"""Text from a checkpoint. Imports the core; the core never imports it."""

"""The command line, one file per verb group: parses arguments and calls the implementation."""

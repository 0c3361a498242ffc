"""The command line: one file a verb group. Parses words, composes a configuration, calls."""

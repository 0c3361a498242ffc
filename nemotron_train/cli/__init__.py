"""The command line, one file per verb group: arguments, help, exit codes."""

"""The `fastclap` command, a file a command."""

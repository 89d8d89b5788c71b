"""The `fastclap` command: `main` and a module a command."""

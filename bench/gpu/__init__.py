"""GPU evidence in lots: `python -m bench.gpu` (see `bench.gpu.__main__`)."""

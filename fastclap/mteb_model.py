"""The public name of `fastclap.apps.mteb_model`."""

from fastclap.apps.mteb_model import MTEBEncoder

__all__ = ["MTEBEncoder"]

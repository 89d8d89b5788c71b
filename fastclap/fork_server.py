"""The process that helper processes are forked from: it has imported torch and the package and holds no CUDA state."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

# A forked process (a notebook's launcher makes some) would take its parent's server for its own and fail on it.
os.register_at_fork(after_in_child=lambda: forkserver.ForkServer.__init__(forkserver._forkserver))


def fork_server() -> BaseContext:
    """Start the server, unless it runs, and return the context whose processes come from it.

    It takes as long as `import torch`: whoever will need processes calls this early, and goes on beside it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastclap.data.dataset"])
    forkserver.ensure_running()
    return context

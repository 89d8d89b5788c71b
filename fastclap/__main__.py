"""`python -m fastclap` is the `fastclap` command."""

from __future__ import annotations

from fastclap.commands.main import main

raise SystemExit(main())

"""Run a recipe to its end in this process without a server, as interruptible as the command line is."""

from __future__ import annotations

import sys

from flows.recipes import load_recipe
from flows.running.interruption import Interrupted, be_interruptible
from tests.support.here import run_here

if __name__ == "__main__":
    be_interruptible()
    print("begins", flush=True)
    try:
        run_here(load_recipe(sys.argv[1]))
    except Interrupted as end:
        sys.exit(end.exit_code)

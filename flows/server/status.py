"""The state of things here: the server, who works for it, the runs that live, the last one that ended, the promoted models."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flows.reports.history import state
from flows.running.pools import CPU_POOL, CUDA_POOL, online_workers
from flows.server.standing import standing_api
from tasks.caching.runs import past_runs
from tasks.config import PROMOTED
from tasks.refs import home

if TYPE_CHECKING:
    from rich.console import Console


def examine_now() -> dict[str, Any]:
    """home, server (None without one), workers {pool: names} (None where it does not answer), running, last, promoted."""
    api = os.environ.get("PREFECT_API_URL") or standing_api()
    runs = [run for run in past_runs() if run["parent"] is None]
    told = [_told(run) for run in runs]
    return {
        "home": str(home()),
        "server": api,
        "workers": _workers(api) if api else None,
        "running": [run for run in told if run["state"] == "running"],
        "last": next((run for run in told if run["state"] != "running"), None),
        "promoted": sorted(path.parent.name for path in (home() / "models").glob(f"*/{PROMOTED}")),
    }


def _told(run: Mapping[str, Any]) -> dict[str, Any]:
    stages: Sequence[Mapping[str, Any]] = run["stages"]
    return {
        "id": run["id"],
        "recipe": run["recipe"],
        "state": state(run),
        "stage": stages[-1]["name"] if stages else None,
        "seconds": round(time.time() - run["started"]),
        "error": run["error"],
    }


def _workers(api: str) -> dict[str, list[str]] | None:
    import httpx
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with temporary_settings({PREFECT_API_URL: api, PREFECT_CLIENT_MAX_RETRIES: 0}):
            return {pool: online_workers(pool) for pool in (CPU_POOL, CUDA_POOL)}
    except httpx.HTTPError:
        return None


def show_status(now: Mapping[str, Any], console: Console) -> None:
    """A line a thing."""

    def say(name: str, text: str) -> None:
        console.print(f"{name + ':':10}{text}", soft_wrap=True, highlight=False, markup=False)

    say("home", now["home"])
    say("server", now["server"] or "none is up; amazon-ft up starts one, amazon-ft run needs none")
    if now["workers"] is not None:
        for pool, names in now["workers"].items():
            say(pool, ", ".join(names) or f"no worker is online; amazon-ft worker {pool} is one")
    elif now["server"]:
        say("workers", "the server does not answer")
    for run in now["running"]:
        say("running", f"{run['id']} {run['recipe']}: {run['stage'] or 'begins'}, for {run['seconds']:,} s")
    if last := now["last"]:
        reason = f": {last['error'].splitlines()[0]}" if last["error"] else ""
        say("last", f"{last['id']} {last['recipe']}: {last['state']}{reason}")
    say("promoted", ", ".join(now["promoted"]) or "no model yet")

"""Who hears of a run beside its record: its log, the Prefect UI of a deployed one, and the recipe's tracker."""

from __future__ import annotations

from flows.reports.run_log import RunLog
from flows.reports.trackers import Tracking, check_tracking
from flows.reports.ui import Artifacts
from flows.running.deployed import flow_run_id
from tasks.caching.events import Detached, Observer, RowsPassed
from tasks.config import TrackingConfig

UI_SECONDS, TRACKER_SECONDS = 10.0, 120.0
"""How long the end of a run waits until they have taken all that they were told."""


def subscribers(config: TrackingConfig, run: str | None = None) -> tuple[Observer, ...]:
    """Return those of a run; each but the log on a thread of its own.

    Args:
        config: names the tracker.
        run: the id of the run that this one only trains for.

    Raises:
        ConfigError: when the tracker is not installed.
    """
    check_tracking(config)
    found: list[Observer] = [RunLog(run)]
    if (flow_run := flow_run_id()) is not None:
        found.append(Detached(Artifacts(flow_run), "the Prefect UI", close_seconds=UI_SECONDS))
    if config.report_to != "none":
        tracking = Tracking(config, run)
        found.append(Detached(tracking, config.report_to, close_seconds=TRACKER_SECONDS, newest=(RowsPassed,)))
    return tuple(found)

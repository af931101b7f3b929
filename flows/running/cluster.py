"""Where the source files of a run are read: on the cluster that the environment names, else in its process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tasks.refs import ConfigError

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner

CLUSTER = "AMAZON_FT_DASK"
"""Names a Dask scheduler, such as tcp://10.0.0.1:8786, whose workers see AMAZON_FT_HOME and the sources under the same paths."""


def task_runner() -> TaskRunner[Any]:
    """Where the files of a run are read: on the cluster that the environment names, else in this process.

    Raises:
        ConfigError: when a cluster is named and the package for it is missing.
    """
    from prefect.task_runners import ThreadPoolTaskRunner

    address = os.environ.get(CLUSTER)
    if not address:
        return ThreadPoolTaskRunner()
    try:
        from prefect_dask.task_runners import DaskTaskRunner  # pyright: ignore[reportMissingImports]  # the extra `dask`
    except ImportError as error:
        raise ConfigError(
            f"{CLUSTER}: no package for it: got {address}; expected prefect-dask. Install amazon-ft[dask] or unset it."
        ) from error
    return DaskTaskRunner(address=address)

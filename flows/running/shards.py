"""Several source files: each is read by a task of its own, cached on its own, and then they are joined."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from tasks.caching.stage import Unknown
from tasks.config import IngestConfig
from tasks.ingest import ingest
from tasks.join import join
from tasks.refs import ConfigError, Products, Shards, Source

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner

CLUSTER = "AMAZON_FT_DASK"
"""Names a Dask scheduler, such as tcp://10.0.0.1:8786, whose workers see AMAZON_FT_HOME and the sources under the same paths."""


def read_products(source: Source, config: IngestConfig) -> Products:
    """The products of all files: to the byte those of reading them as one.

    Of four files, adding a fifth runs one `ingest`, and `join`. On a cluster (a Dask or Ray task runner) all files are read
    at once.
    """
    if isinstance(source, Unknown) or len(source.files) == 1:  # pyright: ignore[reportUnnecessaryIsInstance]  # while planning
        return ingest(source, config)
    files = [Source(files=(file,), is_shard=True, artifact=source.artifact) for file in source.files]
    parts = ingest.each(*((file, config) for file in files))
    unknown = next((part for part in cast("list[object]", parts) if isinstance(part, Unknown)), None)
    products = join(cast("Shards", unknown) if unknown else gathered(parts), config)
    ingest.reached()
    return products


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


def gathered(parts: Sequence[Products]) -> Shards:
    """Parts as one value, with the sums of their counts."""
    return Shards(
        data=tuple(part.data for part in parts),
        rejects=tuple(part.rejects for part in parts if part.rejects),
        lines=sum(part.lines for part in parts),
        dropped=dict(sum((Counter(part.dropped) for part in parts), Counter[str]())),
    )


__all__ = ["gathered", "read_products", "task_runner"]

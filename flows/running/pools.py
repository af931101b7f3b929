"""The two work pools, their queues, and who serves them."""

from __future__ import annotations

TRAINING = "amazon-ft-train/cuda"
"""The deployment of the child flow."""
CPU_POOL, CUDA_POOL = "cpu", "cuda"
DEFAULT_QUEUE, URGENT = "default", "urgent"
"""Work queues of both pools: Prefect's own, and the one that goes before it."""


def online_workers(pool: str) -> list[str]:
    """Names of the workers that poll a pool now; none when there is no such pool."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
    from prefect.client.schemas.objects import WorkerStatus

    online = WorkerFilter(status=WorkerFilterStatus(any_=[WorkerStatus.ONLINE]))
    with get_client(sync_client=True) as client:
        try:
            return [worker.name for worker in client.read_workers_for_work_pool(pool, worker_filter=online)]
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 404:
                raise
            return []

"""The processes of a training on several devices, begun with the libraries imported; torchrun's agent starts them cold."""

from __future__ import annotations

import os
from pathlib import Path

from torch.distributed import TCPStore

from tests.support.checkout import PROJECT
from tests.support.forked import Forked


def launch_forked(devices: int, folder: Path) -> None:
    """Stands in for tasks.training.parallel.launch.launch: the same program in the same environment."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(devices),
        "LOCAL_WORLD_SIZE": str(devices),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    errors = [folder / f"error-{rank}.json" for rank in range(devices)]
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(errors[rank])} for rank in range(devices)]
    ranks = [Forked(["-m", "tasks.rank", folder], cwd=PROJECT, env=os.environ | shared | one) for one in own]
    assert [rank.wait() for rank in ranks] == [0] * devices, [error.read_text() for error in errors if error.is_file()]

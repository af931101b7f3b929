"""Reads files as ingest does, whatever is in them, in a process whose memory can be told.

python -m tests.support.read_files FILE...      a line of JSON a file: rows by what became of them, most memory so far in MiB
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tasks.config import IngestConfig
from tasks.ingest import ingest
from tasks.reading.sources import locate_source


def peak_mib() -> int:
    """Most memory that this process had in use, mapped files included. Source: proc_pid_status(5)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0]) >> 10


if __name__ == "__main__":
    for name in sys.argv[1:]:
        config = IngestConfig(sources=(name,), on_bad_row="quarantine", max_bad_share=1)
        products = ingest.fn(locate_source(config.sources), config)
        rejected = products.rejects.rows if products.rejects else 0
        told = {"read": products.lines, "kept": products.data.rows, "rejected": rejected, "dropped": products.dropped}
        print(json.dumps(told | {"peak_mib": peak_mib()}), flush=True)

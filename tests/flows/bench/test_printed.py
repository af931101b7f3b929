"""What is measured can be read on a terminal of 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from flows.bench.data import Measured, data_table
from flows.bench.train import speed_table

SIDES = ("ours", "document")
MEASURED = [Measured(side, turns, 1085.9, 9.9, 31 * 10**8, 5 * 10**8, {}, 0.5) for side in SIDES for turns in (1, 3)]
TRAINED = {"tokens_per_second": 25_119.4, "share_of_limit": 0.561, "peak_gib": 68.25, "seconds_to_first_step": 142.1}


@pytest.mark.parametrize(
    ("table", "cells"),
    [
        (
            data_table(MEASURED, 2_248_619_000, 1_700_000_000),
            ["document", "1085.9", "2,070,742", "3.10 GB", "0.50 GB", "anonymous", "1.0"],
        ),
        (
            speed_table(dict.fromkeys(("fp8-backward", "document"), TRAINED)),
            ["fp8-backward", "25,119", "56.1%", "68.2 GiB", "142.1 s"],
        ),
    ],
)
def test_no_cell_of_a_table_is_cut_at_80_columns(table: Table, cells: list[str]) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "…" not in printed
    assert [cell for cell in cells if cell not in printed] == []

"""The libraries' progress bars, which a log turns into one endless line."""

from __future__ import annotations

import os

SWITCHES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Of huggingface_hub, which transformers asks too; of datasets; of tqdm itself, which transformers' GGUF reader calls."""


def hide_bars() -> None:
    """Keep bars out of what this process and those it starts print; before the libraries are imported, which look once."""
    for name in SWITCHES:
        os.environ.setdefault(name, "1")

"""Compile what servers, workers and trainings import; every module of every library would be as much again as its source.

usage: python -B compile_imports.py
"""

from __future__ import annotations

import py_compile
import sys
from importlib import import_module
from pathlib import Path

MODULES = (
    "accelerate",
    "asyncpg",
    "datasets",
    "gguf",
    "matplotlib.backends.backend_svg",
    "matplotlib.pyplot",
    "msgspec",
    "peft",
    "polars",
    "prefect.cli",
    "prefect.deployments",
    "prefect.server.api.server",
    "prefect.workers.process",
    "prefect_docker.worker",
    "prefect_kubernetes.worker",
    "prefect_kubernetes.observer",
    "pyarrow.dataset",
    "rouge_score.rouge_scorer",
    "sacrebleu",
    "safetensors.torch",
    "sqlalchemy.ext.asyncio",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
    "uvicorn",
    "websockets.client",
)


def imported_files(names: tuple[str, ...]) -> set[Path]:
    """The sources of the modules and of all that they import, Python's own library too: some bases come without bytecode."""
    for name in names:
        import_module(name)
    named = {Path(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    return {file for file in named if file.suffix == ".py" and file.is_file()} - {Path(__file__)}


def compile_for_good(file: Path) -> None:
    """Write bytecode that is not compared with its source again, so that its bytes don't depend on when it was made."""
    py_compile.compile(str(file), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


if __name__ == "__main__":
    for source in imported_files(MODULES):
        compile_for_good(source)

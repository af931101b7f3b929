"""`amazon-ft doctor`: what a run of a recipe would miss here, found before it is started.

Every check does what the run will do, in so far as that costs seconds: it resolves the model, matches the source, asks the
server.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import IO, Literal, cast

from packaging.requirements import Requirement

from flows.running.gpus import visible_gpus
from flows.running.pools import CPU_POOL, CUDA_POOL, online_workers
from tasks.caching.context import planning
from tasks.caching.plans import Unknown
from tasks.config import Recipe
from tasks.finetune import prepare_training
from tasks.model import SMOLLM2, WHEEL, base_model
from tasks.reading.downloads import without_query
from tasks.reading.sources import URL, locate_source
from tasks.refs import Model, PipelineError, home

ROOM_BYTES = 2 * 2**30
"""For checkpoints, the adapter and what a stage writes on the side."""
GROWTH = 3
"""All stages' data against the source's size, measured on the real file: products, turns, texts and tokens."""
CATALOGUE_ROW_BYTES = 400
PIP_SECONDS = 120
"""How long the package index may take."""
MIN_DRIVER = 525
"""The oldest NVIDIA driver that runs CUDA 12 programs; CUDA 13's minor versions need 580."""

State = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `missing` fails the run, `note` does not."""

    check: str
    state: State
    found: str
    advice: str = ""


def examine(recipe: Recipe) -> list[Finding]:
    """All checks of a recipe, in the order in which a run would meet them."""
    checks: tuple[Callable[[Recipe], Iterator[Finding]], ...] = (_versions, _gpu, _source, _model, _memory, _disk, _server)
    return [finding for check in checks for finding in check(recipe)]


def _versions(recipe: Recipe) -> Iterator[Finding]:
    wrong = [problem for text in requires("amazon-ft") or () if (problem := _unmet(Requirement(text), recipe))]
    python = f"python {sys.version.split()[0]}"
    if wrong:
        yield Finding("libraries", "missing", f"{python}; {'; '.join(wrong)}", "pip install -c constraints.txt amazon-ft[cuda]")
    else:
        yield Finding("libraries", "ok", f"{python}, prefect {version('prefect')}, torch {version('torch')}")


def _unmet(requirement: Requirement, recipe: Recipe) -> str | None:
    """The fault of a requirement that counts for the recipe, if any: its extras but `cuda` never do."""
    extra = "cuda" if recipe.finetune.backend == "unsloth" and "unsloth" in requirement.name else ""
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
        return None
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} {found}, expected {requirement.specifier}"


def _gpu(recipe: Recipe) -> Iterator[Finding]:
    gpus = visible_gpus()
    if gpus:
        names = ", ".join(gpu.name + (f" ({gpu.memory_mib / 1024:.0f} GiB)" if gpu.memory_mib else "") for gpu in gpus)
        old = int(gpus[0].driver.split(".")[0]) < MIN_DRIVER
        yield Finding("gpu", "missing" if old else "ok", f"{names}, driver {gpus[0].driver}", "Update the driver." if old else "")
        if recipe.device == "cuda" and not _torch_sees_cuda():
            built = version("torch")
            yield Finding(
                "torch", "missing", f"torch {built} sees no GPU", "Install a torch built for CUDA that fits the driver."
            )
    elif recipe.device == "cuda":
        yield Finding("gpu", "missing", "none (nvidia-smi)", "Run where one is, serve pool cuda from there, or --set device=cpu.")
    else:
        yield Finding("gpu", "ok", "none; this recipe trains on the CPU")


def _torch_sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _source(recipe: Recipe) -> Iterator[Finding]:
    if recipe.catalogue is not None:
        yield Finding("source", "ok", f"generated: {recipe.catalogue.rows:,} lines")
    named = (*recipe.ingest.sources, *recipe.sample.eval_sources)
    remote = [source for source in named if URL.match(source)]
    local = tuple(source for source in named if source not in remote)
    yield from (_remote_source(url) for url in remote)
    try:
        files = locate_source(local).files
    except PipelineError as error:
        yield Finding("source", "missing", str(error), "Paths begin where the run starts; see AMAZON_FT_DATA for workers.")
        return
    yield from (Finding("source", "ok", f"{file.url}, {file.size_bytes / 2**20:,.1f} MiB") for file in files)


def _remote_source(url: str) -> Finding:
    import fsspec

    try:
        with cast("AbstractContextManager[IO[bytes]]", fsspec.open(url, "rb")) as file:
            file.read(1)
    except Exception as error:
        told = without_query(f"{url}: {str(error) or type(error).__name__}")
        return Finding("source", "missing", told, "Check the address and the network.")
    return Finding("source", "ok", without_query(url))


def _planned_model(recipe: Recipe) -> Model | Unknown:
    """The base model, or a plan's answer for what was not fetched yet."""
    with planning(recipe.name):
        return base_model(recipe.model)


def _model(recipe: Recipe) -> Iterator[Finding]:
    try:
        model = _planned_model(recipe)
    except PipelineError as error:
        yield Finding("model", "missing", str(error))
        return
    if isinstance(model, Unknown):
        yield _fetchable()
    else:
        yield Finding("model", "ok", f"{model.name}: {model.digest[:60]}")


def _memory(recipe: Recipe) -> Iterator[Finding]:
    """How the training would lie in the GPUs' memory; nothing where it can't be told yet, or other checks say what is missing."""
    if recipe.device != "cuda" or not visible_gpus() or not _torch_sees_cuda():
        return
    longest = recipe.tokenize.max_tokens if recipe.pack is None else recipe.pack.tokens
    try:
        model = _planned_model(recipe)
    except PipelineError:
        return
    if isinstance(model, Unknown):
        return
    try:
        resolved = prepare_training(model, recipe.finetune, recipe.model.weights, recipe.device, longest)
    except PipelineError as error:
        yield Finding("gpu memory", "missing", str(error))
        return
    if (estimate := resolved.estimated_gib) is not None:
        shared = ", the base model shared out over all devices" if resolved.sharded else ""
        yield Finding("gpu memory", "ok", f"{estimate['total']:.1f} GiB estimated of {resolved.free_gib:.1f} GiB free{shared}")


def _fetchable() -> Finding:
    """Whether the package index can be asked for the demo's model."""
    name, wanted = WHEEL.split("==")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", name]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("model", "missing", f"{SMOLLM2}: no answer in {PIP_SECONDS} s", "Check the network, or set model.id.")
    if done.returncode or wanted not in done.stdout:
        reason = (done.stderr.strip().splitlines() or [f"no version {wanted}"])[-1]
        return Finding("model", "missing", f"{SMOLLM2}: {reason}", "Check the network and pip's index, or set model.id.")
    return Finding("model", "ok", f"{SMOLLM2}: to be fetched from the package index (93 MB)")


def _disk(recipe: Recipe) -> Iterator[Finding]:
    existing = next(parent for parent in (home(), *home().parents) if parent.exists())
    free, need = shutil.disk_usage(existing).free, _needed_bytes(recipe)
    sizes = f"{home()}: {free / 2**30:,.1f} GiB free, about {need / 2**30:,.1f} GiB needed"
    yield Finding("disk", "ok", sizes) if free >= need else Finding("disk", "missing", sizes, "amazon-ft cache gc, or move it.")


def _needed_bytes(recipe: Recipe) -> int:
    """An estimate from the size of the source; what is cached is not taken off."""
    if recipe.catalogue is not None:
        return GROWTH * recipe.catalogue.rows * CATALOGUE_ROW_BYTES + ROOM_BYTES
    try:
        files = locate_source(tuple(source for source in recipe.ingest.sources if not URL.match(source))).files
    except PipelineError:
        return ROOM_BYTES
    return GROWTH * sum(file.size_bytes for file in files) + ROOM_BYTES


def _server(_recipe: Recipe) -> Iterator[Finding]:
    import httpx

    url = os.environ.get("PREFECT_API_URL")
    if not url:
        yield Finding("server", "note", "PREFECT_API_URL is not set; `amazon-ft run` needs no server", "To deploy: amazon-ft up")
        return
    try:
        healthy = httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.HTTPError:
        healthy = False
    if not healthy:
        yield Finding("server", "missing", f"{url} does not answer", "amazon-ft up, or check PREFECT_API_URL.")
        return
    yield Finding("server", "ok", url)
    for pool in (CPU_POOL, CUDA_POOL):
        online = online_workers(pool)
        yield (
            Finding(f"pool {pool}", "ok", ", ".join(online))
            if online
            else Finding(f"pool {pool}", "missing", "no worker online", f"amazon-ft deploy, then amazon-ft worker {pool}")
        )

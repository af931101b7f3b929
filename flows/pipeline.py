"""The story: from a product file to a fine-tuned model, one call per stage. Needs no Prefect, so that it can be planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from tasks.baseline import baseline
from tasks.caching.context import context, planning, within
from tasks.caching.files import digested_aside
from tasks.caching.plans import Plan, Unknown
from tasks.caching.stage import StageReached, lineage
from tasks.catalogue import catalogue
from tasks.config import IngestConfig, Recipe
from tasks.evaluate import evaluate
from tasks.finetune import finetune
from tasks.ingest import ingest, processes_beside
from tasks.join import join
from tasks.model import base_model
from tasks.pack import pack
from tasks.reading.columns import FIELDS
from tasks.reading.files.apart import begin_ahead, end_begun
from tasks.reading.files.blocks import check_files, look, resolve_kind
from tasks.reading.sources import digest_files, find_files
from tasks.refs import Adapter, Evaluation, HeldOut, Lineage, Prepared, Products, SavedModel, Shards, Source
from tasks.sample import sample
from tasks.save import save
from tasks.sharegpt import sharegpt
from tasks.template import template
from tasks.text.encoding import load_ahead
from tasks.text.merged_prompt import prompt_columns
from tasks.tokenize import tokenize

Tuned = tuple[Adapter, Evaluation]


def tune(recipe: Recipe, prepared: Prepared) -> Tuned:
    """The stages that need the device; Unsloth must be imported before what it patches, so the training comes first."""
    model, held_out, weights, device = prepared.model, prepared.held_out, recipe.model.weights, recipe.device
    watched = held_out.tokens if recipe.finetune.eval_steps else None
    adapter = finetune(model, prepared.batches, recipe.finetune, weights, recipe.tokenize.max_tokens, device, watched)
    base = baseline(model, held_out, recipe.evaluate, weights, device)
    return adapter, evaluate(model, adapter, base, held_out, recipe.evaluate, weights, recipe.sharegpt.merged_prompt, device)


def plan_tuning(recipe: Recipe, prepared: Prepared) -> Plan:
    """Plan `tune`, up to the stage that the run is to end with."""
    with planning(recipe.name) as found, suppress(StageReached):
        tune(recipe, prepared)
    return found


def pipeline(recipe: Recipe, tune_there: Callable[[Recipe, Prepared], Tuned] = tune) -> SavedModel:
    """All stages of a recipe; each call runs, is served from its record, or is only planned (tasks/caching/stage.py).

    `tune_there` is `tune` on whatever machine has the device.
    """
    with within(verify=recipe.cache.verify):
        extra = extra_columns(recipe)
        held_out_files, held_out_reading = checked_files(recipe.sample.eval_sources, recipe, "sample.eval_sources")
        source = catalogue(recipe.catalogue) if recipe.catalogue else None
        files, reading = ([], recipe.ingest) if source else checked_files(recipe.ingest.sources, recipe)
        with digested_aside([*files, *held_out_files]) as begun:
            model = base_model(recipe.model)
            if begun and not isinstance(model, Unknown):  # pyright: ignore[reportUnnecessaryIsInstance]  # while planning
                load_ahead(model.tokenizer)
            if begun:
                begin_ahead(processes_beside(files[:1], reading))  # each file is read by itself
        try:
            products = read_products(source or digest_files(files), reading, extra)
        finally:
            if context().plan is None:  # else the run that follows takes them over
                end_begun()
        others = digest_files(held_out_files, "sample.eval_sources") if held_out_files else None
        split = sample(products, recipe.sample, read_products(others, held_out_reading, extra) if others else None)
        conversations = sharegpt(split, recipe.sharegpt)
        own = model.tokenizer.chat_template if recipe.template.source == "model" else None
        texts = template(conversations, model.tokenizer.special, recipe.template, own)
        tokens = tokenize(texts, model.tokenizer, recipe.tokenize)
        batches = pack(tokens.train, recipe.pack) if recipe.pack else tokens.train
        # unchecked: while planning, what is still to be made is Unknown
        held_out = HeldOut.model_construct(
            tokens=tokens.evaluation, texts=texts.evaluation, template=texts.template, tokenizer=model.tokenizer
        )
        prepared = Prepared.model_construct(model=model, batches=batches, held_out=held_out)
        adapter, evaluation = tune_there(recipe, prepared)
        told = with_kind(lineage(), reading)
        return save(adapter, evaluation, texts.template, model, model.tokenizer, model.name, recipe.save, told)


def checked_files(sources: tuple[str, ...], recipe: Recipe, setting: str = "ingest.sources") -> tuple[list[Path], IngestConfig]:
    """The files of a setting, and the settings of ingest with the kind of rows that they hold; only their beginnings are read.

    Raises:
        InputError: for a file that is not there, in an unknown format, or without a wanted column.
    """
    files = find_files(sources, setting)
    reading = resolve_kind(files, recipe.ingest)
    check_files(files, reading, extra_columns(recipe))
    return files, reading


def describe_sources(recipe: Recipe) -> list[str]:
    """A line a source file: its format, kind and columns.

    Raises:
        InputError: as `pipeline`, for a source that it would refuse.
    """
    named = {"ingest.sources": recipe.ingest.sources, "sample.eval_sources": recipe.sample.eval_sources}
    found = [checked_files(sources, recipe, setting) for setting, sources in named.items() if sources]
    told = [(path, reading) for files, reading in found for path in files]
    return [
        f"{path.name}: {seen.format.value} of {reading.kind}; columns {', '.join(seen.columns)}"
        for path, reading, seen in ((path, reading, look(path, reading)) for path, reading in told)
    ]


def with_kind(told: Lineage, reading: IngestConfig) -> Lineage:
    """The lineage with the kind of rows that was found, so that a saved model is asked as it was trained."""
    ingest = told.recipe.get("ingest")
    return (
        told.model_copy(update={"recipe": told.recipe | {"ingest": {**ingest, "kind": reading.kind}}})
        if isinstance(ingest, dict)
        else told
    )


def plan_run(recipe: Recipe, until: str | None = None) -> Plan:
    """The steps of a run of the recipe, up to the stage that it is to end with, and why; nothing is run."""
    with within(until=until), planning(recipe.name) as found, suppress(StageReached):
        pipeline(recipe)
    return found


def extra_columns(recipe: Recipe) -> tuple[str, ...]:
    """The columns that the merged prompt names beside a product's own.

    Raises:
        ConfigError: for a prompt that is none.
    """
    return tuple(name for name in prompt_columns(recipe.sharegpt.merged_prompt) if name not in FIELDS)


def read_products(source: Source, config: IngestConfig, extra: tuple[str, ...] = ()) -> Products:
    """The products of all files: to the byte those of reading them as one.

    Of four files, adding a fifth runs one `ingest`, and `join`. On a cluster (a Dask or Ray task runner) all files are read
    at once.
    """
    if isinstance(source, Unknown) or len(source.files) == 1:  # pyright: ignore[reportUnnecessaryIsInstance]  # while planning
        return ingest(source, config, extra)
    files = [Source(files=(file,), is_shard=True, artifact=source.artifact) for file in source.files]
    parts = ingest.each(*((file, config, extra) for file in files))
    unknown = next((part for part in cast("list[object]", parts) if isinstance(part, Unknown)), None)
    products = join(cast("Shards", unknown) if unknown else gather_shards(parts), config)
    ingest.reached()
    return products


def gather_shards(parts: Sequence[Products]) -> Shards:
    """Parts as one value, with the sums of their counts."""
    return Shards(
        data=tuple(part.data for part in parts),
        rejects=tuple(part.rejects for part in parts if part.rejects),
        lines=sum(part.lines for part in parts),
        dropped=dict(sum((Counter(part.dropped) for part in parts), Counter[str]())),
    )

"""The story: from a product file to a fine-tuned model, one call per stage. Needs no Prefect, so that it can be planned."""

from __future__ import annotations

from flows.running.dispatch import tune
from flows.running.shards import read_products
from tasks.caching.stage import Plan, lineage, planning
from tasks.caching.store import verifying
from tasks.catalogue import catalogue
from tasks.config import Recipe
from tasks.ingest import locate_source
from tasks.model import base_model
from tasks.pack import pack
from tasks.refs import Prepared, SavedModel
from tasks.sample import sample
from tasks.save import save
from tasks.sharegpt import sharegpt
from tasks.template import template
from tasks.tokenize import tokenize


def pipeline(recipe: Recipe) -> SavedModel:
    """All stages of a recipe; each call runs, is served from its record, or is only planned (tasks/caching/stage.py)."""
    with verifying(recipe.cache.verify):
        source = catalogue(recipe.catalogue) if recipe.catalogue else locate_source(recipe.ingest.sources)
        model = base_model(recipe.model)
        products = read_products(source, recipe.ingest)
        split = sample(products, recipe.sample)
        conversations = sharegpt(split, recipe.sharegpt)
        texts = template(conversations, model.tokenizer.special, recipe.template)
        tokens = tokenize(texts, model.tokenizer, recipe.tokenize)
        batches = pack(tokens.train, recipe.pack) if recipe.pack else tokens.train
        prepared = Prepared.model_construct(  # unchecked: while planning, what is still to be made is Unknown
            model=model, batches=batches, tokens=tokens.evaluation, texts=texts.evaluation, template=texts.template
        )
        adapter, evaluation = tune(recipe, prepared)
        return save(adapter, evaluation, texts.template, model, model.tokenizer, recipe.save, lineage())


def plan(recipe: Recipe) -> Plan:
    """What a run of the recipe would do, and why; nothing is run."""
    with planning(recipe.name) as found:
        pipeline(recipe)
    return found

"""The parent flow: from a product file to a fine-tuned model, one call per stage."""

from __future__ import annotations

from tasks.catalogue import catalogue
from tasks.ingest import ingest, locate_source
from tasks.model import base_model
from tasks.pack import pack
from tasks.sample import sample
from tasks.save import save
from tasks.sharegpt import sharegpt
from tasks.template import template
from tasks.tokenize import tokenize

from flows.train import train
from tasks.config import Recipe
from tasks.refs import SavedModel


def pipeline(recipe: Recipe) -> SavedModel:
    """The whole story; stage calls run, or are planned (tasks/stage.py)."""
    source = catalogue(recipe.catalogue) if recipe.catalogue else locate_source(recipe.ingest.sources)
    model = base_model(recipe.model)
    products = ingest(source, recipe.ingest)
    split = sample(products, recipe.sample)
    conversations = sharegpt(split, recipe.sharegpt)
    texts = template(conversations, model.tokenizer.special, recipe.template)
    tokens = tokenize(texts, model.tokenizer, recipe.tokenize)
    batches = pack(tokens.train, recipe.pack) if recipe.pack else tokens.train
    adapter, evaluation = train(recipe, model, batches, tokens.evaluation, texts.evaluation)
    return save(adapter, evaluation, texts.template, model, recipe.save)

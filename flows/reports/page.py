"""The report of a run: one HTML file that needs no network, AMAZON_FT_HOME/models/RECIPE/report.html.

It is written when a run has saved its model. Product text is hostile: everything is escaped but the plots, which are ours,
control characters too; and the page asks the browser to run no script and to fetch nothing.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from flows.recipes import load_recipe
from flows.reports.results import Results, flat, read_optional_json
from tasks.caching.context import context
from tasks.caching.files import write_atomic
from tasks.caching.runs import Run
from tasks.refs import InputError, SavedModel, Split, home
from tasks.reporting import plots
from tasks.reporting.markdown import number
from tasks.reporting.model_card import FIGURES
from tasks.reporting.visible import visible

if TYPE_CHECKING:
    from tasks.config import Recipe

logger = logging.getLogger(__name__)

TEMPLATE = "page.html.j2"
SHOWN_ROWS, SHOWN_ANSWERS = 2, 3
RATE_POINTS = 60
DECIMALS = {"perplexity": 2, "bleu": 1, "chrf": 1, "length_ratio": 2}
"""Of figures that aren't told with three."""
MEANING = {
    "length_ratio": "1: as long as the references",
    "repetition": "words said again and again",
    "ends": "the others were cut off",
    "copies_title": "to repeat the title tells nothing of the product",
}
"""Said of figures whose names leave it open."""
HIGHER = {"rouge1", "rouge2", "rougeL", "bleu", "chrf", "ends"}
"""Figures of metrics.json that are better the higher they are; of the others all but length_ratio the lower."""


def report_path(recipe_name: str) -> Path:
    """Where the newest report of a recipe lies, beside the links to its models."""
    return home() / "models" / recipe_name / "report.html"


def find_report(recipe_name: str | None) -> Path:
    """The report of a recipe, or the newest of all.

    Raises:
        InputError: when there is none.
    """
    found = list((home() / "models").glob("*/report.html"))
    if recipe_name is not None:
        found = [path for path in found if path == report_path(recipe_name)]
    if not found:
        raise InputError(
            f"report of {recipe_name or 'the newest model'}: got none under {home() / 'models'}; expected a model to be saved. "
            f"Run amazon-ft run {recipe_name or 'demo'}."
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def write_report(recipe: Recipe, saved: SavedModel) -> Path | None:
    """Write the report of the present run; None, and a warning, where that fails: a run does not fail of its report."""
    run = context().run
    path = report_path(recipe.name)
    try:
        assert run is not None, "a report is of a run"
        write_atomic(path, render(page_facts(run, recipe, saved)).encode())
    except Exception as error:
        logger.warning("report.html could not be written (%s: %s); the run goes on.", type(error).__name__, error)
        logger.debug("report.html", exc_info=True)
        path.unlink(missing_ok=True)  # the one before is of another run
        return None
    return path


def render(told: Mapping[str, Any]) -> str:
    """The page of a run's facts."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flows.reports", ""),
        autoescape=True,
        finalize=lambda value: visible(value) if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "decimals": decimals}
    return environment.get_template(TEMPLATE).render(told)


def page_facts(run: Run, recipe: Recipe, saved: SavedModel) -> dict[str, Any]:
    """Everything that the page shows."""
    record = asdict(run)
    results = Results(record)
    lineage = read_optional_json(saved.data / "lineage.json")
    return {
        "recipe": recipe.name,
        "description": recipe.description,
        "model": str(home() / "models" / recipe.name / saved.name),
        "model_link": f"{quote(saved.name)}/README.md",
        "run_link": f"../../runs/{quote(run.id)}.json",
        "run": run.id,
        "ended": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "seconds": time.time() - run.started,
        "verdict": record.get("verdict"),
        "rows": results.metrics.get("rows"),
        "comparison": compare_figures(results.metrics),
        "difference": results.metrics.get("difference"),
        "buckets": results.metrics.get("buckets", []),
        "plots": drawings(results, recipe),
        "examples": results.examples(saved.data.path, SHOWN_ROWS),
        "answers": choose_answers(results.generations, results.metrics.get("per_row", [])),
        "funnel": funnel(results),
        "stages": [{**entry, "made_in": results.seconds(entry)} for entry in results.stages],
        "digests": _digests(saved, lineage),
        "config": compared_settings(recipe),
        "environment": {**lineage.get("versions", {}), **_plain(results.resolved)},
    }


def compare_figures(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each figure that both models have, with its interval and whether the tuned one is better.

    >>> row, = compare_figures({"base": {"nll": 2.5, "chrf": 9.0}, "tuned": {"nll": 0.5, "nll_low": 0.4, "nll_high": 0.6}})
    >>> row["name"], row["better"], row["base"], row["tuned"], row["gained"]
    ('nats per token', 'lower', (2.5, None, None), (0.5, 0.4, 0.6), True)
    """
    base, tuned = metrics.get("base", {}), metrics.get("tuned", {})
    return [
        {
            "name": name,
            "meaning": MEANING.get(figure, ""),
            "decimals": DECIMALS.get(figure, 3),
            "better": better(figure),
            **{key: tuple(model.get(f"{figure}{end}") for end in ("", "_low", "_high")) for key, model in _models(metrics)},
            "gained": _cost(tuned[figure], better(figure)) < _cost(base[figure], better(figure)),
        }
        for figure, name in FIGURES.items()
        if base.get(figure) is not None and tuned.get(figure) is not None
    ]


def better(figure: str) -> str:
    """Which values of a figure are the better ones.

    >>> better("nll"), better("chrf"), better("length_ratio")
    ('lower', 'higher', 'nearer to 1')
    """
    return "nearer to 1" if figure == "length_ratio" else "higher" if figure in HIGHER else "lower"


def decimals(value: float, places: int = 3) -> str:
    """A figure as its neighbours are written.

    >>> decimals(0), decimals(4.4213), decimals(12345.6, 1)
    ('0.000', '4.421', '12,345.6')
    """
    return f"{value:,.{places}f}"


def _models(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, metrics[name]) for name in ("base", "tuned")]


def _cost(value: float, way: str) -> float:
    return {"lower": value, "higher": -value}.get(way, abs(value - 1))


def drawings(results: Results, recipe: Recipe) -> dict[str, str]:
    """{title: SVG} of what there is to draw, in the page's own text colour."""
    from markupsafe import Markup

    steps = results.training
    curves: dict[str, tuple[dict[str, plots.Points], str]] = {
        "Loss": ({"training": _logged(steps, "loss"), "held out": _logged(steps, "held_out_loss")}, "nats per token"),
        "Learning rate": ({"": _logged(steps, "learning_rate")}, ""),
        "Speed": ({"": speeds(steps)}, "tokens/s"),
        "Memory": ({"": _logged(steps, "memory_gib")}, "GiB"),
    }
    drawn = {title: plots.curves(series, "step", up) for title, (series, up) in curves.items() if any(series.values())}
    if results.lengths:
        limit = recipe.tokenize.max_tokens
        drawn["Length of the training rows"] = plots.histogram(results.lengths, "tokens", "rows", limit=limit)
    return {title: Markup(svg.replace(plots.GREY, "currentColor")) for title, svg in drawn.items()}


def _logged(steps: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, figure) of the steps where the log has a number for it."""
    return [(step["step"], step[name]) for step in steps if step.get(name) is not None and math.isfinite(step[name])]


def speeds(steps: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(step, tokens a second since the point before) where the log has times; a resumed training's clock begins anew.

    >>> speeds([{"step": 1, "tokens": 90, "seconds": 1.0}, {"step": 2, "tokens": 100, "seconds": 3.0}])
    [(2, 50.0)]
    """
    timed = [step for step in steps if math.isfinite(step.get("seconds", math.nan))]
    every = max(1, len(timed) // RATE_POINTS)
    points: list[tuple[float, float]] = []
    last, tokens = 0, 0
    for index, step in enumerate(timed[1:], start=1):
        tokens += step["tokens"]
        passed = step["seconds"] - timed[last]["seconds"]
        if index - last >= every and passed > 0:
            points.append((step["step"], tokens / passed))
        if index - last >= every and passed != 0:
            last, tokens = index, 0
    return points


def choose_answers(
    generations: Sequence[Mapping[str, Any]], per_row: Sequence[Mapping[str, Any]]
) -> dict[str, list[Mapping[str, Any]]]:
    """The best, the worst and some other answers, by how likely the tuned model holds the reference to be; each once."""
    nll = {uid: row["tuned_nll"] for row in per_row for uid in row["uids"]}
    ranked = sorted((row for row in generations if row["uid"] in nll), key=lambda row: nll[row["uid"]])
    count = min(SHOWN_ANSWERS, -(-len(ranked) // 3))
    best, worst = ranked[:count], ranked[max(count, len(ranked) - count) :][::-1]
    shown = {row["uid"] for row in [*best, *worst]}
    rest = [row for row in generations if row["uid"] not in shown]
    drawn = random.Random(0).sample(rest, min(SHOWN_ANSWERS, len(rest)))
    return {
        title: [{**row, "nll": nll.get(row["uid"])} for row in rows]
        for title, rows in (("Best", best), ("Worst", worst), ("Drawn at random", drawn))
    }


def funnel(results: Results) -> list[tuple[str, int, str]]:
    """(what, how many, what became of the others), from the lines that were read to the rows that were trained on."""
    found: list[tuple[str, int, str]] = []
    if (products := results.products) is not None:
        rejected = products.rejects.rows if products.rejects else 0
        lost = {**products.dropped, "set aside: malformed": rejected}
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in lost.items() if count)
        found += [("lines read", products.lines, ""), ("products kept", products.data.rows, left_out)]
    if (split := results.value("sample", Split)) is not None:
        both = f", {split.counts['in both']:,.0f} left out as rows of both" if "in both" in split.counts else ""
        found.append(("drawn to train on", split.train.rows, f"{split.evaluation.rows:,} held out{both}"))
    if (conversations := results.value("sharegpt", Split)) is not None:
        found.append(("conversations", conversations.train.rows, ""))
    if (tokens := results.value("tokenize", Split)) is not None:
        lost = {"too long": tokens.counts.get("overlong", 0), "with nothing to learn": tokens.counts.get("unlearnable", 0)}
        found.append(("rows of tokens", tokens.train.rows, ", ".join(f"{n:,.0f} {why}" for why, n in lost.items() if n)))
    if (packs := results.entry("pack")) is not None:
        found.append(("packs", packs["rows"], ""))
    if results.training:
        found.append((f"{'packs' if packs else 'rows'} trained on", *_trained_on(results)))
    return found


def _trained_on(results: Results) -> tuple[int, str]:
    tune = results.run["config"]["finetune"]
    batches = results.entry("pack", "tokenize")
    there = batches["rows"] if batches else 0
    seen = len(results.training) * tune["batch_size"] * tune["gradient_accumulation"]
    tokens = sum(step["tokens"] for step in results.training)
    return min(seen, there), f"{seen / max(there, 1):.2f} epochs, {tokens:,} tokens"


def compared_settings(recipe: Recipe) -> list[tuple[str, Any, Any, bool]]:
    """(key, value, the value of recipe `default`, whether they differ), those that differ first."""
    own, default = flat(recipe.model_dump(mode="json")), flat(load_recipe("default").model_dump(mode="json"))
    rows = [(key, own.get(key), default.get(key), own.get(key) != default.get(key)) for key in {**own, **default}]
    return sorted(rows, key=lambda row: not row[3])


def _digests(saved: SavedModel, lineage: Mapping[str, Any]) -> dict[str, str]:
    base = lineage.get("base_model", {})
    found = {"base model": base.get("name"), "base model's digest": base.get("digest"), "tokenizer": base.get("tokenizer")}
    told = {"saved model": saved.data.digest, "adapter": lineage.get("adapter"), **found}
    return {name: digest for name, digest in told.items() if digest}


def _plain(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Resolved settings of the training, but for versions, which the lineage has."""
    return {f"training: {key.replace('_', ' ')}": value for key, value in flat(resolved).items() if "versions." not in key}

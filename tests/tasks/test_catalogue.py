"""The generated catalogue has the true file's form and defects, and facts that follow from the titles."""

from __future__ import annotations

import json
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.catalogue import BRANDS, KINDS, MATERIALS, Facts, catalogue, count_right, facts, lines, states_facts, title_in
from tasks.config import CatalogueConfig
from tasks.refs import Source

titles = st.builds(
    "{} {} {} {} cm".format,
    st.sampled_from([*BRANDS]),
    st.sampled_from([*MATERIALS]),
    st.sampled_from(KINDS),
    st.integers(10, 59),
)


def rows_of(config: CatalogueConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(config) if line.endswith("}")]


def test_lines_have_the_fields_of_the_true_file() -> None:
    rows = rows_of(CatalogueConfig(rows=50, malformed_lines=0))
    assert len({row["uid"] for row in rows}) == 50
    for row in rows:
        assert [*row] == ["uid", "title", "content", "target_ind", "target_rel"]
        assert len(row["target_ind"]) == len(row["target_rel"])


def test_lines_have_the_defects_of_the_true_file() -> None:
    rows = rows_of(CatalogueConfig(rows=5000, malformed_lines=0))
    written = [row for row in rows if row["content"]]
    repeats = sum(count - 1 for count in Counter((row["title"], row["content"]) for row in rows if row["title"]).values())
    assert sum(not row["content"] for row in rows) / 5000 == pytest.approx(0.333, abs=0.02)
    assert sum(not row["title"] for row in rows) / 5000 == pytest.approx(0.056, abs=0.01)
    assert sum("&#39;" in row["content"] for row in written) / len(written) == pytest.approx(0.2, abs=0.02)
    assert any("\x92" in row["content"] for row in written)
    assert repeats > 100


def test_as_many_lines_are_broken_as_asked() -> None:
    broken = 0
    for line in lines(CatalogueConfig(rows=100, malformed_lines=3)):
        try:
            json.loads(line)
        except ValueError:
            broken += 1
    assert broken == 3


@given(st.integers(0, 2**32 - 1))
def test_every_content_states_the_facts_of_its_title(seed: int) -> None:
    for row in rows_of(CatalogueConfig(rows=10, seed=seed, malformed_lines=0)):
        if row["title"] and row["content"]:
            content = unescape(row["content"])
            assert states_facts(row["title"], content)
            assert f" {facts(row['title']).size_cm} cm" in content


@given(titles, titles)
def test_an_answer_about_another_product_is_wrong_unless_the_facts_agree(title: str, other: str) -> None:
    answer = f"{facts(other).brand}'s own, of {facts(other).material}."
    agree = (facts(title).brand, facts(title).material) == (facts(other).brand, facts(other).material)
    assert states_facts(title, answer) == agree


def test_right_answers_are_counted_model_by_model() -> None:
    right, wrong = "Norvik's tray of stainless steel.", "Norvik's tray of glass."
    asked = "Título do produto: Aurora Brushed Tray 15 cm\n"
    generations = [
        {"prompt": asked, "base": wrong, "tuned": right},
        {"prompt": asked, "base": right, "tuned": right},
        {"prompt": "no title here", "base": right, "tuned": right},
    ]
    assert (count_right(generations, "base"), count_right(generations, "tuned")) == (1, 2)


def test_an_answer_that_names_every_brand_is_wrong() -> None:
    assert not states_facts("Aurora Brushed Tray 15 cm", "Norvik or Castello, of stainless steel")


@given(titles)
def test_the_title_is_found_in_a_prompt(title: str) -> None:
    assert title_in(f"<s>### Título do produto:\nTítulo do produto: {title}\n\n### Pergunta:\nO que é?") == title


def test_facts_of_a_foreign_title_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^title 'Girls Ballet Tutu': expected LINE FINISH KIND SIZE cm, as the catalogue writes it$"
    ):
        facts("Girls Ballet Tutu")


def test_facts_follow_from_a_title() -> None:
    assert facts("Fjord Glazed Vase 12 cm") == Facts(brand="Castello", material="ceramic", size_cm=12)


def test_catalogue_publishes_the_same_bytes_for_the_same_settings() -> None:
    first, again = (catalogue.fn(CatalogueConfig(rows=20)) for _ in range(2))
    other = catalogue.fn(CatalogueConfig(rows=20, seed=8))
    assert first == again
    assert first.files[0].digest != other.files[0].digest
    assert len(Path(first.files[0].url).read_text().splitlines()) == 20


def test_the_default_catalogue_is_the_one_that_the_demo_was_tuned_on() -> None:
    """The same on every Python; a change here reruns the demo."""
    assert catalogue.fn(CatalogueConfig()).files[0].digest == "a7a7374e99f93abac7f2b9c844f256ee816cd303d891516df9b7c747adffff6e"


def test_a_recorded_source_follows_its_moved_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = catalogue.fn(CatalogueConfig(rows=10)).model_dump_json()
    assert str(tmp_path) not in record
    (tmp_path / "home").rename(tmp_path / "moved")
    monkeypatch.setenv("AMAZON_FT_HOME", str(tmp_path / "moved"))
    moved = Source.model_validate_json(record)
    assert Path(moved.files[0].url).is_relative_to(tmp_path / "moved")
    assert Path(moved.files[0].url).is_file()

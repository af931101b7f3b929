"""What README, CONTRIBUTING and their like name is there: files, folders, links, commands, targets of make."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.main import get_command

from flows.cli.main import app
from tasks.training.exporting.architectures import ARCHITECTURES
from tasks.training.fast.families import FAMILIES
from tests.flows.test_own_data import KINDS
from tests.support.checkout import PROJECT
from tests.support.rows import WRITERS

README_LINES = 150
ROOTS = (".ci", ".github", "deployments", "docker", "flows", "tasks", "tests")
"""What a path of the project begins with."""
PATH = re.compile(rf"(?<![\w./~-])(?:{'|'.join(map(re.escape, ROOTS))})/[\w./-]*")
FILE = re.compile(
    r"(?<![\w./~-])[A-Z]{4,}\.md\b|\bpyproject\.toml\b|\bconstraints\.txt\b|(?<![\w/])\.[a-z-]+\.ya?ml\b|\.editorconfig\b"
)
MODULE = re.compile(r"python -m (tests\.[\w.]+)")
PLACEHOLDER = "NAME"
GUIDES = (
    "deployments/README.md",
    "tasks/training/README.md",
    "deployments/recipes/README.md",
    "deployments/kubernetes/README.md",
    "docker/README.md",
)
DOCUMENTS = [
    path
    for name in ("README.md", "CONTRIBUTING.md", "tests/README.md", "tests/bench/README.md", *GUIDES)
    if (path := PROJECT / name).is_file()
]
README = DOCUMENTS[0].read_text(encoding="utf-8")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))


def linked(document: Path) -> list[str]:
    """What links lead to, but for other sites."""
    return re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8"))


def named(text: str) -> set[str]:
    """Paths from the project's root, without those that stand for any name."""
    text = re.sub(r"\]\([^)]*\)", "]", text)
    found = {path.rstrip("./") for path in (*PATH.findall(text), *FILE.findall(text))}
    return {path for path in found if PLACEHOLDER not in path}


def rooms(package: str) -> set[str]:
    """Folders of a package with modules in them, itself left out."""
    root = PROJECT / package
    return {str(path.parent.relative_to(PROJECT)) for path in root.rglob("*.py")} - {package}


def folders(tree: str) -> set[str]:
    """Folders of an indented tree, as paths."""
    found, above = set[str](), list[tuple[int, str]]()
    for indent, name in re.findall(r"^( +)([\w-]+)/(?= )", tree, re.MULTILINE):
        above = [(depth, parent) for depth, parent in above if depth < len(indent)]
        found.add("/".join([*(parent for _, parent in above), name]))
        above.append((len(indent), name))
    return found


def test_readme_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= README_LINES


@each_document
def test_every_link_leads_somewhere(document: Path) -> None:
    assert [link for link in linked(document) if not (document.parent / link).exists()] == []


@each_document
def test_every_path_that_is_named_exists(document: Path) -> None:
    assert sorted(path for path in named(document.read_text(encoding="utf-8")) if not (PROJECT / path).exists()) == []


@each_document
def test_every_module_that_is_run_exists(document: Path) -> None:
    modules = MODULE.findall(document.read_text(encoding="utf-8"))
    assert [module for module in modules if find_spec(module) is None] == []


@each_document
def test_every_target_of_make_exists(document: Path) -> None:
    targets = re.findall(r"(?:^ {4}|`)make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE)
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@each_document
def test_every_command_that_is_named_exists(document: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    named_ones = re.findall(
        r"(?:^ {4}|^ {4}\$ |`)(?:\.venv/bin/)?amazon-ft ([a-z]+)", document.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(named_ones) <= set(commands)


def test_every_command_is_described() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert [name for name in commands if f"amazon-ft {name}" not in README] == []


@pytest.mark.parametrize("package", ["flows", "tasks"])
def test_tree_names_every_room_and_no_other(package: str) -> None:
    tree = folders(README.split("## Where things are\n")[1])
    assert {path for path in tree if path.startswith(f"{package}/")} == rooms(package)
    assert {path for path in tree if not (PROJECT / path).is_dir()} == set()


def test_every_folder_of_the_design_exists(shared: Path) -> None:
    layout = (shared / "DESIGN.md").read_text(encoding="utf-8").split("## Layout")[1].split("\n## ")[0]
    found = folders(layout)
    assert {"flows/running", "tasks/training"} <= found
    assert sorted(path for path in found if not (PROJECT / path).is_dir()) == []


def test_every_kind_of_row_is_in_the_table_that_a_test_runs() -> None:
    kinds = re.findall(r"^\| `(\w+)` \|", README.split("| kind of row |")[1].split("\n\n")[0], re.MULTILINE)
    assert kinds == list(KINDS)
    header = README.split("| kind of row |")[1].splitlines()[0].lower()
    named = {
        "jsonl": "json lines",
        "json": "json array",
        "csv": "csv",
        "tsv": "tsv",
        "parquet": "parquet",
        "datasets": "datasets",
    }
    named |= dict.fromkeys(("arrow", "arrows"), "arrow ipc")
    assert named.keys() == WRITERS.keys()
    assert [name for name in named.values() if name not in header] == []


def test_every_shipped_recipe_is_described() -> None:
    described = (PROJECT / "deployments" / "recipes" / "README.md").read_text(encoding="utf-8")
    shipped = [path.name for path in (PROJECT / "deployments" / "recipes").glob("*.yaml")]
    assert [name for name in shipped if f"]({name})" not in described] == []


def test_every_family_is_in_the_table_with_the_models_that_it_covers() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \(`(\w+)`\) \|", (PROJECT / "tasks" / "training" / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {kind: title for title, kind in rows} == {kind: family.title for kind, family in FAMILIES.items()}
    assert FAMILIES.keys() == ARCHITECTURES.keys()


def test_paths_are_found_in_prose_and_in_code() -> None:
    text = "See tasks/pack.py, [it](x/y.md), `flows/cli/`; tasks/NAME.py, ~/tasks/x and a/flows/b are none. CHANGELOG.md."
    assert named(text) == {"tasks/pack.py", "flows/cli", "CHANGELOG.md"}
    assert folders("    flows/   a\n      cli/   b\n    tasks/   c\n") == {"flows", "flows/cli", "tasks"}

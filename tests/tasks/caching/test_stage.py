"""A stage is served from its record exactly when its key is known and its output intact, and says why when not."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tasks.caching import runs
from tasks.caching.context import context, open_run, planning, within
from tasks.caching.engine import PrefectEngine
from tasks.caching.plans import Plan
from tasks.caching.stage import Made, OnlyServed, StageReached, lineage
from tasks.config import SampleConfig
from tasks.refs import Artifact, InputError, PipelineError, Products
from tests.support import toy

pytestmark = pytest.mark.usefixtures("prefect_api")


def story(text: str = "abc", rows: int = 2) -> Any:
    return toy.count(toy.read(text, SampleConfig(rows=rows)))


def run(text: str = "abc", rows: int = 2) -> list[dict[str, Any]]:
    """Run the toy story as a flow; returns the entries of its record."""
    from prefect import flow

    with open_run("toy", {"rows": rows}, engine=PrefectEngine()) as record:
        flow(name="toy")(story)(text, rows)
    return record.stages


def plan(text: str = "abc", rows: int = 2) -> Plan:
    with planning("toy") as found:
        story(text, rows)
    return found


def states(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["state"] for entry in entries]


def reasons(found: Plan) -> list[tuple[str, str]]:
    return [(step.state, step.reason) for step in found.steps]


def test_second_run_serves_every_stage_from_its_record() -> None:
    assert states(run()) == ["completed", "completed"]
    assert states(run()) == ["cached", "cached"]


def test_only_served_serves_without_prefect_and_makes_nothing(home: Path) -> None:
    run()
    with open_run("toy", {}, engine=OnlyServed()) as record:
        story()
    assert states(record.stages) == ["cached", "cached"]
    for artifact in (home / "artifacts").glob("*/*"):
        shutil.rmtree(artifact)
    with pytest.raises(PipelineError, match=r"read: output missing: .*, though it was there when this run began\. Run again\."):
        with open_run("toy", {}, engine=OnlyServed()):
            story()


def test_plan_runs_nothing_and_foresees_what_a_run_does(home: Path) -> None:
    assert reasons(plan()) == [("run", "first run"), ("unknown", "unknown until read")]
    assert not (home / "artifacts").exists()
    run()
    assert reasons(plan()) == [("cached", ""), ("cached", "")]
    assert context().plan is None


@pytest.mark.parametrize("record", ["null", "[]", '"x"', "{}", "{"])
def test_a_record_that_is_none_is_made_again(record: str, home: Path) -> None:
    run()
    for file in (home / "records").iterdir():
        file.write_text(record)
    assert states(run()) == ["completed", "completed"]


def test_changed_input_is_named_with_both_values() -> None:
    run()
    assert reasons(plan(rows=5)) == [("run", "config.rows 2 -> 5"), ("unknown", "unknown until read")]
    assert next(entry["reason"] for entry in run(rows=5)) == "config.rows 2 -> 5"


def test_changed_data_is_told_by_its_name_and_growth() -> None:
    run("abc")
    run("abc", rows=5)
    assert reasons(plan("abcd", rows=5))[0] == ("run", 'text "abc" -> "abcd"')
    more = Products(data=Artifact(kind="products", digest="d" * 64, rows=1300))
    with planning("toy") as found:
        toy.count(more)
    assert reasons(found) == [("run", "products changed (1,295 rows more); resumable from step 3")]


def test_first_run_of_a_recipe_is_compared_with_no_other_recipes() -> None:
    run("abc")
    with planning("other") as found:
        story("def", 5)
    assert reasons(found)[0] == ("run", "first run")


def test_stage_below_stays_cached_when_the_bytes_come_out_equal() -> None:
    run("abc")
    assert states(run("ABC")) == ["completed", "cached"]


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_damaged_output_is_made_again_and_nothing_is_served_from_it(damage: str) -> None:
    file = toy.read.fn("abc", SampleConfig(rows=2)).data / "rows.txt"
    run()
    if damage == "delete":
        file.unlink()
    else:
        file.write_text("ABCAB" if damage == "truncate" else "ABCABD")
    expected = "output missing" if damage == "delete" else "output corrupt"
    assert reasons(plan())[0] == ("run", f"{expected}: {file.relative_to(file.parents[3])}")
    assert states(run()) == ["completed", "cached"]
    assert file.read_text() == "ABCABC"


def test_torn_record_is_no_hit(home: Path) -> None:
    key = run()[0]["key"]
    record = home / "records" / key
    record.write_bytes(record.read_bytes()[:-20])
    assert reasons(plan())[0] == ("run", f"record corrupt: records/{key}")
    assert states(run()) == ["completed", "cached"]


def test_size_verification_is_marked() -> None:
    run()
    file = toy.read.fn("abc", SampleConfig(rows=2)).data / "rows.txt"
    file.write_text("ABCABD")
    with within(verify="size"):
        entries = run()
    assert states(entries) == ["cached", "cached"]
    assert entries[0]["reason"] == "verified by size only"


def test_unfinished_stage_says_so_and_from_where_it_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.count, "fn", lambda products: (_ for _ in ()).throw(InputError("toy.count: broken")))
    with pytest.raises(InputError):
        run()
    assert reasons(plan())[1] == ("run", "did not finish last time; resumable from step 3")


def test_users_mistake_comes_through_unchanged_and_is_not_retried() -> None:
    with pytest.raises(InputError, match=r"^toy\.read: text: got 'bad'; expected anything else\. Say something else\.$"):
        run("bad")
    assert [entry["state"] for entry in runs.past_runs()[0]["stages"]] == ["failed"]
    assert runs.past_runs()[0]["finished"] is False
    assert str(runs.past_runs()[0]["error"]).startswith("toy.read: text: got 'bad'")


def test_what_a_worker_made_for_this_run_is_told_as_made(home: Path) -> None:
    made = run()
    with within(elsewhere={made[0]["key"]: made[0]}):
        entries = run()
    assert states(entries) == ["completed", "cached"]
    assert entries[0]["reason"] == made[0]["reason"] == "first run"
    assert entries[0]["seconds"] == made[0]["seconds"]


def test_transient_error_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.caching import engine

    monkeypatch.setattr(engine, "RETRY_DELAYS_SECONDS", [0.0])
    body, failures = toy.read.fn, iter([ConnectionError("storage went away")])

    def flaky(text: str, config: SampleConfig) -> Any:
        for failure in failures:
            raise failure
        return body(text, config)

    monkeypatch.setattr(toy.read, "fn", flaky)
    assert states(run("flaky")) == ["completed", "completed"]


def test_run_ends_with_the_stage_asked_for() -> None:
    with within(until="read"), pytest.raises(StageReached):
        run()
    assert [entry["name"] for entry in runs.past_runs()[0]["stages"]] == ["read"]


def test_lineage_tells_the_stages_so_far() -> None:
    from prefect import flow

    with open_run("toy", {"rows": 2}, engine=PrefectEngine()):
        flow(name="toy")(story)()
        told = lineage()
    assert [(stage.name, stage.rows) for stage in told.stages] == [("read", 2), ("count", 1)]
    assert told.recipe == {"rows": 2}


def test_version_of_a_stage_is_part_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    monkeypatch.setattr(toy.read, "version", 2)
    assert reasons(plan())[0] == ("run", "stage version or modules changed")


def test_decision_finds_what_a_run_recorded() -> None:
    inputs = {"text": "abc", "config": SampleConfig(rows=2)}
    assert (toy.read.decide(inputs).made, toy.read.decide(inputs).miss) == (None, "not run yet")
    run()
    found = toy.read.decide(inputs).made
    assert found is not None
    assert found.value.data.rows == 2


class AtOnce:
    """An engine that starts all calls, as a cluster does; whoever asks for the first outcome waits."""

    WAITED_SECONDS = 0.5

    def start(self, stage: Any, calls: Sequence[Any]) -> list[Callable[[], Any]]:
        made = [stage.make(call.inputs, call.code) for call in calls]
        return [partial(self.wait, outcome, outcome is made[0]) for outcome in made]

    def wait(self, outcome: Any, is_first: bool) -> Any:
        time.sleep(self.WAITED_SECONDS * is_first)
        return outcome


def test_waiting_for_a_cluster_is_booked_to_no_file() -> None:
    with open_run("toy", {}, engine=AtOnce()) as run:
        toy.read.each(*((text, SampleConfig(rows=2)) for text in ("abc", "def", "ghi")))
    assert [entry["state"] for entry in run.stages] == ["completed"] * 3
    assert max(entry["seconds"] for entry in run.stages) < AtOnce.WAITED_SECONDS


def test_a_worker_with_other_code_than_the_runs_makes_nothing(home: Path) -> None:
    inputs = {"text": "abc", "config": SampleConfig(rows=2)}
    code = toy.read.code(inputs)
    with pytest.raises(
        PipelineError, match=r"^read: got code changed: tests/support/toy\.py in process \d+ on .*; expected the code"
    ):
        toy.read.make(inputs, code | {"tests.support.toy": "0" * 64})
    assert not (home / "artifacts").exists()


def test_a_record_tells_how_long_its_making_took() -> None:
    entry = run()[0]
    made = toy.read.recorded(entry["key"])
    assert made.seconds == entry["seconds"] > 0


def test_no_bit_of_a_record_can_flip_unnoticed() -> None:
    text = Made(toy.read.fn("abc", SampleConfig(rows=2)), 1.0).to_json().encode()
    for position in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError):  # noqa: PT011  # of whatever kind: JSON, UTF-8, the seal, a field
            Made.from_json(bytes(flipped), toy.read.returns)

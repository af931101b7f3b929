"""deployments/prefect.yaml as somebody has it who lets Prefect build and push an image for each pool."""

from __future__ import annotations

from typing import Any

import yaml

from flows.server.registration import PREFECT_FILE

BUILD, PUSH = (f"prefect_docker.deployments.steps.{name}_docker_image" for name in ("build", "push"))


def with_images() -> dict[str, Any]:
    """The file with the edits that its comments name."""
    text = PREFECT_FILE.read_text(encoding="utf-8")
    for pool in ("cpu", "cuda"):
        before = f"  {pool}: &{pool} # or: <<: *{pool}-image\n    work_pool:\n      name: {pool}\n"
        assert before in text
        text = text.replace(before, f"  {pool}: &{pool}\n    <<: *{pool}-image\n")
    return yaml.safe_load(text)


def step(deployment: dict[str, Any], name: str) -> dict[str, Any]:
    """What a step of a deployment is given."""
    (given,) = (each[name] for each in (*deployment["build"], *deployment["push"]) if name in each)
    return given

"""Records as a run leaves them."""

from __future__ import annotations

import json

from pydantic import BaseModel

from tasks.caching.files import write_atomic
from tasks.caching.stage import Made
from tasks.refs import home


def write_record(key: str, value: BaseModel, seconds: float = 1.0) -> None:
    """records/KEY of a stage that returned a value."""
    write_atomic(home() / "records" / key, json.dumps({"result": Made(value, seconds).to_json()}).encode())

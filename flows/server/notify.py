"""Who hears of runs: automations that tell a notification block of the server what became of a model, or of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import yaml

from flows.recipes import SHIPPED
from tasks.refs import ConfigError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.events.schemas.automations import AutomationCore

NOTIFICATIONS = SHIPPED.parent / "notifications.yaml"


class Block(NamedTuple):
    """A notification block of the server."""

    name: str
    """TYPE/NAME, as `slack-webhook/team`."""
    id: UUID


def notify(block: Block, say: Callable[[str], None]) -> None:
    """Let a block of the server at PREFECT_API_URL hear of models and of runs that went wrong.

    `say` hears of each automation as it is created or brought up to date.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for automation in _automations(block):
            there = client.read_automations_by_name(automation.name)
            if there:
                client.update_automation(there[0].id, automation)
            else:
                client.create_automation(automation)
            say(f"automation {automation.name}: {'brought up to date' if there else 'created'}")


def find_block(name: str) -> Block:
    """A block of the server at PREFECT_API_URL, by TYPE/NAME.

    Raises:
        ConfigError: when the server has no such block.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    kind, _, own = name.partition("/")
    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        if found := client.read_block_document_by_name(own, kind).id:
            return Block(name, found)
    raise ConfigError(
        f"deploy --notify: no such block on the server: got {name}; expected TYPE/NAME of a notification block, such as "
        "slack-webhook/team, custom-webhook/team or sendgrid-email/team. Make it in the UI (Blocks), which keeps its secrets."
    )


def _automations(block: Block) -> Iterator[AutomationCore]:
    from prefect.events.schemas.automations import AutomationCore

    for settings in yaml.safe_load(NOTIFICATIONS.read_text(encoding="utf-8"))["automations"]:
        message = settings.pop("message")
        told = {"type": "send-notification", "block_document_id": block.id, **message}
        settings["name"] = f"amazon-ft tells {block.name} of {settings['name']}"
        yield AutomationCore.model_validate({**settings, "actions": [told]})

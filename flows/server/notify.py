"""Who hears of runs: automations that tell a notification block of the server what became of a model, or of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import yaml

from flows.recipes import SHIPPED
from tasks.refs import ConfigError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

NOTIFICATIONS = SHIPPED.parent / "notifications.yaml"


def notify(block: str, say: Callable[[str], None]) -> None:
    """Let a block of the server at PREFECT_API_URL, as `slack-webhook/team`, hear of models and of runs that went wrong.

    `say` hears of each automation as it is created or brought up to date.

    Raises:
        ConfigError: when the server has no such block.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for automation in _automations(block, _block_id(client, block)):
            there = client.read_automations_by_name(automation.name)
            if there:
                client.update_automation(there[0].id, automation)
            else:
                client.create_automation(automation)
            say(f"automation {automation.name}: {'brought up to date' if there else 'created'}")


def _block_id(client: SyncPrefectClient, block: str) -> UUID:
    from prefect.exceptions import ObjectNotFound

    kind, _, name = block.partition("/")
    try:
        found = client.read_block_document_by_name(name, kind).id
    except ObjectNotFound:
        found = None
    if found is None:
        raise ConfigError(
            f"deploy --notify: no such block on the server: got {block}; expected TYPE/NAME of a notification block, such as "
            "slack-webhook/team, custom-webhook/team or sendgrid-email/team. Make it in the UI (Blocks), which keeps its secrets."
        )
    return found


def _automations(block: str, block_id: UUID) -> Iterator[AutomationCore]:
    from prefect.events.schemas.automations import AutomationCore

    for settings in yaml.safe_load(NOTIFICATIONS.read_text(encoding="utf-8"))["automations"]:
        message = settings.pop("message")
        told = {"type": "send-notification", "block_document_id": block_id, **message}
        settings["name"] = f"amazon-ft tells {block} of {settings['name']}"
        yield AutomationCore.model_validate({**settings, "actions": [told]})

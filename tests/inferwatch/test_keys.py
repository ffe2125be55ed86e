"""Keys on disk: modes, digests only, refusals; and the receiver that checks signatures."""

import base64
import hashlib
import stat
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from standardwebhooks.webhooks import Webhook

from collector.identity import KeyProblem
from inferwatch.keys import add_api_key, create_tenant_key
from inferwatch.receiver import Receiver

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()


def test_a_tenant_key_is_private_and_never_replaced(tmp_path: Path) -> None:
    """Mode 0600; a second one is refused, since it would break the link to earlier events."""
    file = create_tenant_key(tmp_path / "keys", "default")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(KeyProblem, match="exists"):
        create_tenant_key(tmp_path / "keys", "default")


@pytest.mark.parametrize("tenant", ["../evil", "Acme", "default.e_00000000", ""])
def test_a_key_is_made_only_for_what_can_be_a_tenant(tmp_path: Path, tenant: str) -> None:
    """Else it would lie outside of the folder, be used by nobody, or stand among another tenant's epochs."""
    with pytest.raises(KeyProblem, match="a tenant's name"):
        create_tenant_key(tmp_path / "keys", tenant)
    assert not list(tmp_path.iterdir())


def test_only_the_digest_of_an_api_key_is_kept(tmp_path: Path) -> None:
    """Two keys in one file; neither secret is in it."""
    file = tmp_path / "api-keys.toml"
    first, first_id = add_api_key(file, tenant="default", user="alice", on_behalf=False)
    second, second_id = add_api_key(file, tenant="acme", user="portal", on_behalf=True)
    text = file.read_text()
    assert first not in text
    assert second not in text
    assert tomllib.loads(text) == {
        first_id: {
            "sha256": hashlib.sha256(first.encode()).hexdigest(),
            "tenant": "default",
            "user": "alice",
            "on_behalf": False,
        },
        second_id: {
            "sha256": hashlib.sha256(second.encode()).hexdigest(),
            "tenant": "acme",
            "user": "portal",
            "on_behalf": True,
        },
    }
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("user", ['a"\n[admin]\nsha256 = "', "back\\slash", "new\nline"])
def test_a_name_cannot_smuggle_in_another_table(tmp_path: Path, user: str) -> None:
    """What would break out of its TOML string is refused, and nothing is written."""
    with pytest.raises(KeyProblem):
        add_api_key(tmp_path / "api-keys.toml", tenant="default", user=user, on_behalf=False)
    assert not (tmp_path / "api-keys.toml").exists()


def test_the_receiver_counts_messages_once_and_refuses_a_wrong_signature() -> None:
    """Same id twice is one; a changed body is 401."""
    now, body = datetime.now(UTC), '{"type":"finding.open"}'
    headers = {
        "webhook-id": "m1",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(SECRET).sign("m1", now, body),
    }
    with Receiver(SECRET) as receiver, httpx.Client(trust_env=False) as client:
        answers = [
            client.post(receiver.url, content=text, headers=headers).status_code for text in (body, body, body + " ")
        ]
        assert answers == [204, 204, 401]
        assert receiver.delivered == 1

"""The settings: what can't be is one sentence, and no secret is repeated."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from sinks.config import FileConfig, SinksConfig, StoreConfig, SyslogConfig, WebhookConfig


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: StoreConfig(url="postgres://x/y"), "a store is chdb:///PATH, http:// or https://, not postgres://"),
        (lambda: StoreConfig(url="http://u:hunter2@h:8123/db"), "take the password out of the URL"),
        (lambda: StoreConfig(urll="x"), "urll"),
        (lambda: StoreConfig(events_days=0), "events_days"),
        (lambda: WebhookConfig(url="https://example.com/", secret_files=()), "secret_files"),
        (lambda: SyslogConfig(host="h", client_key_file="k"), "client_key_file needs client_cert_file"),
        (lambda: FileConfig(path="f", rotate_mb=0), "rotate_mb"),
        (lambda: SinksConfig(pager={}), "pager"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(make, said):
    """And its value, which may be a secret, is not in the message."""
    with pytest.raises(ValidationError) as refused:
        make()
    assert said in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_only_configured_sinks_are_named():
    """In the order of the fields, whatever the order in the file."""
    made = SinksConfig(syslog={"host": "h"}, file={"path": "f"})
    assert (made.names, SinksConfig().names) == (("file", "syslog"), ())


def test_reading_the_settings_loads_no_client():
    """The engine host has neither aiohttp nor chdb, and a command should start at once."""
    program = (
        "import sys, sinks.config; print([m for m in ('aiohttp', 'chdb', 'clickhouse_connect') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"

"""What `inferwatch lookup` tells the store of the text that it looks for."""

from collections.abc import Mapping

import pytest

from collector.identity import Pseudonyms, plain_digest
from inferwatch.lookup import _in_epoch
from sinks.clickhouse.asking import Row

TEXT = "Is my salary above average?"


@pytest.mark.parametrize("plain", [False, True])
def test_a_plain_hash_of_the_text_goes_only_where_events_have_such(plain: bool) -> None:
    """Else whoever reads the store's log of queries could guess what was looked up, without any key."""
    names, sent = Pseudonyms(bytes(range(32))), list[str]()

    def ask(sql: str, parameters: Mapping[str, str]) -> list[Row]:
        sent.append(parameters.get("digests", ""))
        return [{"found": 1}] if plain and "startsWith" in sql else []

    found = _in_epoch(ask, names, "default", TEXT, at_least=0.5, limit=20)
    assert (found.epoch, found.exact, found.similar) == (names.epoch, None, [])
    assert [names.digest(TEXT) in digests for digests in sent] == [False, True, True]
    assert [plain_digest(TEXT.encode()) in digests for digests in sent] == [False, plain, plain]

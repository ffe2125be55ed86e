"""Before whom the proxy may stand."""

import pytest

from collector.proxy_config import ProxyConfig


@pytest.mark.parametrize(
    "upstream_url", ["ftp://x", "http://", "http://u:p@x", "http://x/path", "http://x?q", "http://x:99999", "x", "//x"]
)
def test_an_upstream_is_an_address_and_nothing_more(upstream_url: str) -> None:
    """No path, no password, no other scheme."""
    with pytest.raises(ValueError, match="upstream"):
        ProxyConfig(upstream=upstream_url)

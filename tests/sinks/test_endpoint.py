"""The guard against being sent to a neighbour's door."""

import ipaddress

import pytest

from sinks.endpoint import EndpointForbidden, PinnedResolver, check_address, check_url


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/hook",
        "ftp://example.com/",
        "file:///etc/passwd",
        "https://",
        "https://user:secret@example.com/",
        "https://10.0.0.1/",
        "https://192.168.1.1/",
        "https://172.16.0.1:8443/",
        "https://169.254.169.254/latest/meta-data",
        "https://0.0.0.0/",
        "https://[::]/",
        "https://[fe80::1]/",
        "https://[fc00::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://[64:ff9b::a00:1]/",
        "https://[2002:a00:1::]/",
        "https://100.64.0.1/",
        "https://2130706433.example.com:99999/",
        "https://167772161/",
        "https://0xa000001/",
        "https://012.0.0.1/",
        "https://224.0.0.1/",
        "not a url",
        "https://[bad/",
    ],
)
def test_forbidden_urls(url):
    """Plain http away from here, odd schemes, passwords, and every spelling of an address that is not public."""
    with pytest.raises(EndpointForbidden) as refused:
        check_url(url, allow_private=False)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook",
        "https://93.184.216.34/",
        "http://127.0.0.1:8080/",
        "http://localhost/",
        "http://[::1]:1/",
    ],
)
def test_allowed_urls(url):
    """Public https, and this machine by its own name."""
    assert check_url(url, allow_private=False).url == url


@pytest.mark.parametrize(
    ("address", "public", "private", "local"),
    [
        ("93.184.216.34", True, True, True),
        ("2606:2800:220:1::1", True, True, True),
        ("10.1.2.3", False, True, False),
        ("fd00::1", False, True, False),
        ("100.64.0.1", False, True, False),
        ("127.0.0.1", False, False, True),
        ("::1", False, False, True),
        ("::ffff:127.0.0.1", False, False, True),
        ("169.254.169.254", False, False, False),
        ("::ffff:169.254.169.254", False, False, False),
        ("64:ff9b::a9fe:a9fe", False, False, False),
        ("0.0.0.0", False, False, False),  # noqa: S104  # an address to refuse, not to listen on
        ("255.255.255.255", False, False, False),
        ("ff02::1", False, False, False),
    ],
)
def test_addresses(address, public, private, local):
    """What a name may lead to: public, with allow_private, and for a URL that names this machine."""

    def allowed(url, allow_private):
        try:
            check_address(ipaddress.ip_address(address), check_url(url, allow_private=allow_private))
        except EndpointForbidden:
            return False
        return True

    assert allowed("https://example.com/", False) is public
    assert allowed("https://example.com/", True) is private
    assert allowed("http://localhost/", False) is local


async def test_one_bad_address_refuses_the_name():
    """A name that leads to a public and to a private address is a trap."""

    async def resolve(host, port):
        return ["93.184.216.34", "10.0.0.1"]

    resolver = PinnedResolver(check_url("https://example.com/", allow_private=False), resolve)
    with pytest.raises(EndpointForbidden, match=r"example\.com leads to 10\.0\.0\.1"):
        await resolver.resolve("example.com", 443)


async def test_localhost_is_this_machine_whatever_the_resolver_says():
    """RFC 6761: the name is not looked up."""

    async def resolve(host, port):
        raise AssertionError("looked up")

    resolver = PinnedResolver(check_url("http://localhost/", allow_private=False), resolve)
    assert [entry["host"] for entry in await resolver.resolve("localhost", 80)] == ["127.0.0.1", "::1"]

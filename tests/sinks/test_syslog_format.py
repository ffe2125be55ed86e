"""RFC 5424 messages and octet counting."""

import pytest

from sinks.formats import syslog
from tests.sinks.samples import HOSTILE, START_US


def made(**fields):
    values = {
        "facility": 13, "severity": 3, "timestamp_us": START_US + 1, "host": "soc-1", "app": "inferwatch",
        "process_id": "42", "message_id": "block_rate",
    }  # fmt: skip
    return syslog.message(b"CEF:0|", **(values | fields))


def test_a_message_has_the_fields_of_the_rfc():
    """PRI is facility times eight plus severity; the time has six digits and a Z; no data is a dash."""
    assert made() == b"<107>1 2026-11-20T12:00:00.000001Z soc-1 inferwatch 42 block_rate - CEF:0|"


def test_structured_data_is_written_and_escaped():
    """`\\`, `"` and `]` are escaped in values, nothing else; forbidden characters of names become `_`."""
    data = {'find"ing@1': {"a=b": 'x\\y"z]w=\n', "c]d e": ""}}
    assert syslog.structured_data(data) == '[find_ing@1 a_b="x\\\\y\\"z\\]w=\n" c_d_e=""]'


@pytest.mark.parametrize("name", HOSTILE)
def test_no_value_breaks_out_of_the_header(name):
    """Header fields are printable ASCII without spaces, cut to their lengths, or a dash."""
    value = HOSTILE[name]
    fields = made(host=value, app=value, process_id=value, message_id=value).split(b" ", 7)
    assert len(fields) == 8
    assert fields[7] == b"CEF:0|"
    assert [len(field) <= limit for field, limit in zip(fields[2:6], (255, 48, 128, 32), strict=True)] == [True] * 4
    assert all(33 <= byte <= 126 for field in fields[2:6] for byte in field)


@pytest.mark.parametrize("name", HOSTILE)
def test_structured_data_ends_where_it_should(name):
    """After removing escapes, one opening and one closing bracket and two quotes are left."""
    text = syslog.structured_data({"finding@1": {"v": HOSTILE[name]}})
    bare = text.replace("\\\\", "").replace('\\"', "").replace("\\]", "")
    value = bare.removeprefix('[finding@1 v="').removesuffix('"]')
    assert len(value) == len(bare) - len('[finding@1 v="') - 2
    assert not set(value) & set('"]\\')
    text.encode()


def test_a_frame_counts_octets():
    """Not characters."""
    assert syslog.frame("é🜁".encode()) == b"6 \xc3\xa9\xf0\x9f\x9c\x81"

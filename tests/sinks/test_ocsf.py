"""OCSF 1.8 Detection Finding, held against the compiled schema where that is at hand."""

import gzip
import json
from typing import Any

import pytest

from detectors.finding import Entity
from sinks.formats import ocsf
from tests.sinks.samples import GOLDEN, HOSTILE, OUTSIDE, finding, hostile

SCHEMA = OUTSIDE / "ocsf_compiled_1.8.0.json.gz"
PYTHON = {"string_t": str, "integer_t": int, "long_t": int, "timestamp_t": int, "boolean_t": bool, "float_t": float}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    if not SCHEMA.exists():
        pytest.skip(f"{SCHEMA.name} is not at hand")
    return json.loads(gzip.decompress(SCHEMA.read_bytes()))


def problems(schema: dict[str, Any], document: dict[str, Any], spec: dict[str, Any], path: str, profiles: set[str]):
    """What is missing, unknown, of a wrong type or outside its enumeration, with its path.

    The schema is compiled with every profile: an attribute counts when it has none or one that the document names.
    """
    attributes = {
        name: attribute
        for name, attribute in spec["attributes"].items()
        if attribute.get("profile") is None or attribute["profile"] in profiles
    }
    for name, attribute in attributes.items():
        if attribute["requirement"] == "required" and name not in document:
            yield f"{path}.{name} is missing"
    for rule, names in (spec.get("constraints") or {}).items():
        count = sum(name in document for name in names)
        if count == 0 or (rule == "just_one" and count > 1):
            yield f"{path}: {rule} of {names}"
    for name, value in document.items():
        if name not in attributes:
            yield f"{path}.{name} is unknown"
            continue
        attribute = attributes[name]
        if bool(attribute["is_array"]) != isinstance(value, list):
            yield f"{path}.{name}: array or not"
        for member in value if isinstance(value, list) else [value]:
            yield from member_problems(schema, member, attribute, f"{path}.{name}", profiles)


def member_problems(schema: dict[str, Any], member: Any, attribute: dict[str, Any], path: str, profiles: set[str]):
    kind = attribute["type"]
    if kind in schema["objects"]:
        yield from problems(schema, member, schema["objects"][kind], path, profiles)
        return
    base = kind
    while base not in PYTHON and base != "json_t":
        base = schema["types"][base]["type"]
    if base != "json_t" and type(member) is not PYTHON[base]:
        yield f"{path}: {type(member).__name__} is no {kind}"
    if attribute.get("enum") and base == "integer_t" and str(member) not in attribute["enum"]:
        yield f"{path}: {member} is not in its enumeration"


ENTITIES = [
    ("user", "u_1"),
    ("session", "u_1/s_1"),
    ("api_key", "k_1"),
    ("address", "a_1"),
    ("model", "tiny"),
    ("tenant", "t"),
]


@pytest.mark.parametrize("state", ["open", "update", "close"])
@pytest.mark.parametrize("severity", ["info", "low", "medium", "high", "critical"])
def test_every_state_and_severity_is_valid(schema, state, severity):
    """Nothing missing, unknown, mistyped or out of its enumeration."""
    document = json.loads(ocsf.encode(finding(state=state, severity=severity), product_version="0.1.0"))
    assert list(problems(schema, document, schema["classes"]["detection_finding"], "$", {"security_control"})) == []


@pytest.mark.parametrize(("kind", "entity"), ENTITIES)
def test_every_kind_of_entity_is_valid(schema, kind, entity):
    """Evidence is shaped by the entity, and always one that the class knows."""
    found = finding(entity=Entity(kind=kind, id=entity), detector="rule:x")
    document = json.loads(ocsf.encode(found, product_version="0.1.0"))
    assert list(problems(schema, document, schema["classes"]["detection_finding"], "$", {"security_control"})) == []
    assert document["finding_info"]["analytic"]["type_id"] == 1


def test_the_validator_sees_mistakes(schema):
    """A wrong type, an unknown field, a missing one and a value out of its enumeration are each found."""
    document = json.loads(ocsf.encode(finding(), product_version="0.1.0"))
    del document["metadata"]["product"]
    document |= {"severity_id": 7, "is_alert": "yes", "surprise": 1}
    found = set(problems(schema, document, schema["classes"]["detection_finding"], "$", {"security_control"}))
    assert found == {
        "$.metadata.product is missing",
        "$.severity_id: 7 is not in its enumeration",
        "$.is_alert: str is no boolean_t",
        "$.surprise is unknown",
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_stay_on_one_line_and_valid(schema, name):
    """One line of valid JSON within the limit, still an OCSF document."""
    line = ocsf.encode(hostile(HOSTILE[name]), product_version="0.1.0")
    document = json.loads(line)
    assert b"\n" not in line
    assert b"\r" not in line
    assert len(line) <= ocsf.LINE_BYTES_MAX
    assert list(problems(schema, document, schema["classes"]["detection_finding"], "$", {"security_control"})) == []
    if name not in ("megabyte", "surrogates"):
        assert document["message"] == HOSTILE[name]


def test_a_finding_is_one_known_document():
    """The whole document of a plain finding."""
    assert ocsf.detection_finding(finding(), product_version="0.1.0") == json.loads(
        (GOLDEN / "finding.ocsf.json").read_text(encoding="utf-8")
    )


def test_create_update_and_close_are_activities_of_one_finding():
    """The uid stays, the activity and the revision's own id change."""
    made = [
        ocsf.detection_finding(finding(revision=n, state=state), product_version="0")
        for n, state in ((1, "open"), (2, "update"), (3, "close"))
    ]
    assert [(d["activity_id"], d["type_uid"], d["status_id"]) for d in made] == [
        (1, 200401, 1),
        (2, 200402, 2),
        (3, 200403, 4),
    ]
    assert {d["finding_info"]["uid"] for d in made} == {"f" * 32}
    assert [d["metadata"]["uid"] for d in made] == [f"{'f' * 32}.{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("fields", "status", "alert"),
    [
        ({"suppressed_by": "c1", "quiet": True}, (3, "Suppressed"), False),
        ({"acknowledged_by": "c1"}, (2, "In Progress"), True),
        ({"suppressed_by": "c1", "state": "close"}, (4, "Resolved"), True),
    ],
)
def test_what_people_said_is_the_status(schema, fields, status, alert):
    """Suppressed, in progress, resolved; with who and why, and the incident as what correlates."""
    found = finding(**(fields | {"handled_by": "alice", "handled_why": "test", "incident": "i1", "flapping": 4}))
    document = json.loads(ocsf.encode(found, product_version="0.1.0"))
    assert list(problems(schema, document, schema["classes"]["detection_finding"], "$", {"security_control"})) == []
    assert ((document["status_id"], document["status"]), document["is_alert"]) == (status, alert)
    assert document["comment"].endswith(" by alice (test), command c1.")
    assert (document["metadata"]["correlation_uid"], document["metadata"]["labels"][1:]) == ("i1", ["flapping:4"])

"""A finding as OCSF 1.8 Detection Finding (class 2004), profile security_control. Pure.

Create, update and close are activities 1, 2 and 3 of one `finding_info.uid`; `metadata.uid` names the revision.
Source: schema.ocsf.io, version 1.8.0.
"""

from typing import Final

import orjson

from detectors.finding import Finding
from sinks.formats.text import bounded, fit, handling

LINE_BYTES_MAX: Final = 256 * 1024
ATLAS_VERSION: Final = "5.6.0"
CLASS_UID: Final = 2004

_ACTIVITY: Final = {"open": 1, "update": 2, "close": 3}
_ACTIVITY_NAME: Final = {1: "Create", 2: "Update", 3: "Close"}
_STATUS: Final = {"open": (1, "New"), "update": (2, "In Progress"), "close": (4, "Resolved")}
_SUPPRESSED: Final = (3, "Suppressed")
_ACKNOWLEDGED: Final = (2, "In Progress")
_SEVERITY: Final = {
    "info": (1, "Informational"),
    "low": (2, "Low"),
    "medium": (3, "Medium"),
    "high": (4, "High"),
    "critical": (5, "Critical"),
}
_CONFIDENCE: Final = {"low": (1, "Low"), "medium": (2, "Medium"), "high": (3, "High")}
_OBSERVED: Final = (3, "Observed")
_ALERT: Final = (19, "Alert")
_RULE: Final = (1, "Rule")
_STATISTICAL: Final = (3, "Statistical")


def encode(finding: Finding, *, product_version: str, bytes_max: int = LINE_BYTES_MAX) -> bytes:
    """The document on one line of UTF-8, without the newline; long strings are cut so that it fits `bytes_max`."""
    document = detection_finding(finding, product_version=product_version)
    return fit(lambda limit: orjson.dumps(bounded(document, limit)), bytes_max)


def detection_finding(finding: Finding, *, product_version: str) -> dict[str, object]:
    """The document as builtins."""
    activity = _ACTIVITY[finding.state]
    status_id, status = _status(finding)
    severity_id, severity = _SEVERITY[finding.severity]
    confidence_id, confidence = _CONFIDENCE[finding.confidence]
    document: dict[str, object] = {
        "activity_id": activity,
        "activity_name": _ACTIVITY_NAME[activity],
        "category_uid": 2,
        "category_name": "Findings",
        "class_uid": CLASS_UID,
        "class_name": "Detection Finding",
        "type_uid": CLASS_UID * 100 + activity,
        "type_name": f"Detection Finding: {_ACTIVITY_NAME[activity]}",
        "time": finding.updated_us // 1000,
        "start_time": finding.first_seen_us // 1000,
        "end_time": finding.last_seen_us // 1000,
        "severity_id": severity_id,
        "severity": severity,
        "status_id": status_id,
        "status": status,
        "confidence_id": confidence_id,
        "confidence": confidence,
        "action_id": _OBSERVED[0],
        "action": _OBSERVED[1],
        "disposition_id": _ALERT[0],
        "disposition": _ALERT[1],
        "is_alert": not finding.quiet,
        "message": finding.summary,
        "metadata": _metadata(finding, product_version),
        "finding_info": _finding_info(finding),
        "evidences": [_evidence(finding)],
        "anomaly_analyses": [_anomaly(finding)],
        "resources": [{"name": finding.model, "type": "AI model"}],
    }
    if finding.runbook:
        document["remediation"] = {"desc": "\n".join(finding.runbook)}
    comments = [text for text in (finding.cold_start, handling(finding)) if text]
    if comments:
        document["comment"] = " ".join(comments)
    return document


def _status(finding: Finding) -> tuple[int, str]:
    """What is over is resolved, whatever was said of it before."""
    if finding.state != "close" and finding.suppressed_by:
        return _SUPPRESSED
    if finding.state != "close" and finding.acknowledged_by:
        return _ACKNOWLEDGED
    return _STATUS[finding.state]


def _metadata(finding: Finding, product_version: str) -> dict[str, object]:
    metadata: dict[str, object] = {
        "version": "1.8.0",
        "profiles": ["security_control"],
        "product": {"name": "inferwatch", "vendor_name": "inferwatch", "version": product_version},
        "uid": f"{finding.uid}.{finding.revision}",
        "sequence": finding.revision,
        "tenant_uid": finding.tenant,
        "event_code": finding.detector,
        "log_name": "findings",
        "log_version": finding.schema_version,
        "labels": [f"config_digest:{finding.config_digest}", *_labels(finding)],
    }
    if finding.incident:
        metadata["correlation_uid"] = finding.incident
    return metadata


def _labels(finding: Finding) -> list[str]:
    said = {
        "leads_incident": "true" if finding.leads else "",
        "flapping": str(finding.flapping or ""),
        "false_positive": "true" if finding.false_positive else "",
        "change": finding.change,
    }
    return [f"{name}:{value}" for name, value in said.items() if value]


def _finding_info(finding: Finding) -> dict[str, object]:
    analytic_id, analytic = _RULE if finding.detector.startswith("rule:") else _STATISTICAL
    info: dict[str, object] = {
        "uid": finding.uid,
        "title": f"{finding.detector}: {finding.entity.kind} {finding.entity.id}",
        "desc": finding.summary,
        "types": [finding.detector],
        "first_seen_time": finding.first_seen_us // 1000,
        "last_seen_time": finding.last_seen_us // 1000,
        "modified_time": finding.updated_us // 1000,
        "analytic": {
            "name": finding.detector,
            "version": finding.detector_version,
            "type_id": analytic_id,
            "type": analytic,
        },
        "related_events": [{"uid": event_id} for event_id in finding.evidence.event_ids],
        "data_sources": sorted({offsets.topic for offsets in finding.evidence.offsets}),
    }
    if finding.atlas:
        info["attacks"] = [_attack(technique) for technique in finding.atlas]
    if finding.owasp:
        info["tags"] = [{"name": "owasp_llm", "values": finding.owasp}]
    return info


def _attack(technique: str) -> dict[str, object]:
    """`AML.T0051.000` is a sub-technique of `AML.T0051`."""
    parts = technique.split(".")
    attack: dict[str, object] = {"technique": {"uid": ".".join(parts[:2])}, "version": ATLAS_VERSION}
    if len(parts) > 2:
        attack["sub_technique"] = {"uid": technique}
    return attack


def _evidence(finding: Finding) -> dict[str, object]:
    """Who, and where to look. Ids are pseudonyms."""
    kind, entity = finding.entity.kind, finding.entity.id
    user, _, session = entity.partition("/") if kind == "session" else (entity, "", "")
    evidence: dict[str, object] = {
        "data": {
            "entity": {"kind": kind, "id": entity},
            "statistic": {
                "name": finding.statistic.name,
                "observed": finding.statistic.observed,
                "baseline": finding.statistic.baseline,
                "threshold": finding.statistic.threshold,
                "unit": finding.statistic.unit,
                "improbability": finding.statistic.improbability,
            },
            "counts": finding.counts,
            "offsets": [
                {"topic": r.topic, "partition": r.partition, "first": r.first, "last": r.last}
                for r in finding.evidence.offsets
            ],
            "replay": finding.evidence.replay,
        }
    }
    if kind in ("user", "session"):
        actor: dict[str, object] = {"user": {"uid": user}}
        if session:
            actor["session"] = {"uid": session}
        evidence["actor"] = actor
    elif kind == "address":
        evidence["src_endpoint"] = {"uid": entity}
    return evidence


def _anomaly(finding: Finding) -> dict[str, object]:
    statistic = finding.statistic

    def measured(value: float) -> list[dict[str, object]]:
        named: dict[str, object] = {
            "observation_parameter": statistic.name,
            "observations": [{"value": f"{value:.6g}"}],
        }
        if statistic.unit:
            named["observation_type"] = statistic.unit
        return [named]

    return {
        "analysis_targets": [{"name": finding.entity.id, "type": finding.entity.kind}],
        "anomalies": measured(statistic.observed),
        "baselines": measured(statistic.baseline),
    }

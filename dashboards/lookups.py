"""The questions behind the pages that are no panels: one finding, its revisions, the events of an entity, tenants."""

from typing import Final

from dashboards.panel import BOUND, put_in

EVENTS_PAGE: Final = 100
"""Most events a page lists; older ones are reached by narrowing the time."""

_EVENT_COLUMNS: Final = {
    "columns": """timestamp, event_id, kind, tenant, status, reason, operation, model_version, user_id, session_id,
        prompt_hash, prompt_tokens, response_tokens, latency_ms, ttft_ms, http_status, guard_names, guard_stages,
        guard_decisions, guard_scores, guard_labels, kafka_partition, kafka_offset, late, duplicate, quarantined"""
}

TENANTS: Final = "SELECT DISTINCT tenant FROM events_1m ORDER BY tenant LIMIT 200"
MARKS: Final = put_in(
    """
    SELECT uid, detector, severity, summary, first_seen, last_seen FROM findings_now
    WHERE last_seen >= $from AND first_seen < $to AND $tenant
    ORDER BY last_seen DESC, uid LIMIT 200
    """
)
REVISIONS: Final = """SELECT revision, state, severity, updated, statistic_observed AS observed, json FROM findings
WHERE uid = {uid:String} ORDER BY revision DESC LIMIT 1 BY revision LIMIT 200"""
"""Newest first."""

EVENTS: Final = put_in(
    """
    SELECT $columns FROM events
    WHERE $in_range AND $tenant
        AND ({user:String} = '' OR user_id = {user:String})
        AND ({session:String} = '' OR session_id = {session:String})
        AND ({api_key:String} = '' OR api_key = {api_key:String})
        AND ({address:String} = '' OR client_address = {address:String})
        AND ({model:String} = '' OR model_version = {model:String})
        AND ({prompt:String} = '' OR prompt_hash = {prompt:String})
        AND ({event:String} = '' OR event_id = {event:String})
        AND ({trace:String} = '' OR trace_id = {trace:String})
        AND ({only:String} != 'blocked' OR blocked)
    ORDER BY timestamp DESC, event_id DESC LIMIT {rows:UInt32}
    """,
    BOUND | _EVENT_COLUMNS,
)
SAMPLES: Final = put_in(
    """
    SELECT $columns FROM events WHERE $in_range AND has({ids:Array(String)}, event_id)
    ORDER BY timestamp DESC, event_id DESC LIMIT {rows:UInt32}
    """,
    BOUND | _EVENT_COLUMNS,
)

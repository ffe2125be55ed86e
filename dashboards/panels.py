"""Every panel, defined once; rendered by `view.py` as HTML and by `grafana.py` for Grafana.

What counts: rows that the time rules took, late ones too. Duplicates and quarantined rows are left out everywhere but
in the pipeline's own panels. Latency, tokens and time to first token are those of answered requests (`ok` and
`blocked_output`): a refusal takes 2 ms and would make a slow service look fast. Quantiles are exact.
"""

from typing import Final

from dashboards.panel import Column, Panel, Series

STATUS_TONES: Final = {
    "ok": "calm",
    "blocked_input": "c2",
    "blocked_output": "c5",
    "rejected": "c4",
    "aborted": "grey",
    "error": "bad",
    "lost": "dark",
}
STATS: Final = (
    Panel(
        name="open_findings",
        title="Open findings",
        answers="How many episodes need a person now, whatever the time range? Not those acknowledged or suppressed.",
        kind="stat",
        sql="""
            SELECT count() AS value, countIf(severity = 'critical') AS critical, countIf(severity = 'high') AS high,
                countIf(severity = 'medium') AS medium
            FROM findings_now WHERE state != 'close' AND $tenant AND JSONExtractString(json, 'suppressed_by') = ''
                AND JSONExtractString(json, 'acknowledged_by') = ''
            """,
        series=(
            Series(column="critical", label="critical"),
            Series(column="high", label="high"),
            Series(column="medium", label="medium"),
        ),
        watch_from=1,
        width=2,
    ),
    Panel(
        name="block_share",
        title="Blocked",
        answers="Which share of the requests did the guards block?",
        kind="stat",
        unit="ratio",
        sql="SELECT if(count() = 0, NULL, countIf(blocked) / count()) AS value FROM $events",
        compared=True,
        width=2,
    ),
    Panel(
        name="request_count",
        title="Requests",
        answers="How many requests were recorded, refused ones included?",
        kind="stat",
        sql="SELECT count() AS value FROM $events",
        compared=True,
        width=2,
    ),
    Panel(
        name="latency_p99",
        title="Latency p99",
        answers="How long did the slowest hundredth of the answered requests take?",
        kind="stat",
        unit="ms",
        sql="SELECT if(count() = 0, NULL, quantileExact(0.99)(latency_ms)) AS value FROM $events AND $answered",
        compared=True,
        width=2,
    ),
    Panel(
        name="tokens_generated",
        title="Tokens out",
        answers="How many tokens were generated?",
        kind="stat",
        unit="tokens",
        sql="SELECT sum(response_tokens) AS value FROM $events",
        compared=True,
        width=2,
    ),
    Panel(
        name="sessions",
        title="Sessions",
        answers="How many different sessions sent requests?",
        kind="stat",
        sql="SELECT uniqExact(user_id, session_id) AS value FROM $events",
        compared=True,
        width=2,
    ),
)
FINDINGS: Final = Panel(
    name="findings",
    title="Findings",
    answers="What did the detectors find, and why? Open episodes first, then by severity.",
    kind="table",
    sql="""
        SELECT severity, last_seen, detector, summary, entity_kind, entity_id, model, state, uid, evidence_offsets,
            length(evidence_event_ids) AS samples
        FROM findings_now
        WHERE $tenant AND (state != 'close' OR (last_seen >= $from AND first_seen < $to))
        ORDER BY state = 'close', indexOf(['critical', 'high', 'medium', 'low', 'info'], severity), last_seen DESC, uid
        LIMIT 500
        """,
    columns=(
        Column(column="severity", label="Severity", shown="severity"),
        Column(column="last_seen", label="Last seen", shown="time"),
        Column(column="detector", label="Detector"),
        Column(column="summary", label="What happened", shown="summary"),
        Column(column="entity_id", label="Entity", shown="entity"),
        Column(column="evidence_offsets", label="Evidence", shown="evidence"),
        Column(column="state", label="State", shown="state"),
    ),
    width=8,
    rows=10,
    empty="No findings in this time range, and none open.",
)
PROCESSES: Final = Panel(
    name="processes",
    title="Pipeline",
    answers="Does every process live, and how far behind is it?",
    kind="table",
    sql="""
        SELECT role,
            multiIf(JSONExtractString(json, 'state') = 'stopped', 'stopped',
                at < now64(3) - INTERVAL 45 SECOND, 'silent',
                JSONExtract(json, 'ready', 'Nullable(Bool)') = false, 'not ready', 'running') AS state,
            lag, late, drops, at, version, process_id, JSONExtractString(json, 'why') AS why,
            if(watermark IS NULL, NULL, greatest(0, dateDiff('millisecond', assumeNotNull(watermark), at)) / 1000)
                AS delay_s
        FROM process_status
        ORDER BY state IN ('running', 'stopped'), state = 'stopped', role, at DESC
        LIMIT 100
        """,
    columns=(
        Column(column="role", label="Process"),
        Column(column="state", label="State", shown="process"),
        Column(column="lag", label="Lag", shown="number"),
        Column(column="delay_s", label="Behind", shown="span", unit="s", watch_from=30),
        Column(column="late", label="Late", shown="number"),
        Column(column="drops", label="Dropped", shown="number", watch_from=1),
        Column(column="at", label="Last word", shown="time"),
        Column(column="version", label="Version"),
    ),
    width=4,
    rows=12,
    empty="No process has reported yet.",
)
PLOTS: Final = (
    Panel(
        name="requests",
        title="Requests by status",
        answers="How much traffic is there, and how does it end?",
        kind="timeseries",
        unit="per_minute",
        sql="""
            SELECT $bucket AS time, status AS series, count() * 60 / $bucket_s AS value
            FROM $events
            GROUP BY time, series ORDER BY time, series
            """,
        by="status",
        tones=STATUS_TONES,
        stacked=True,
        width=8,
        detectors=("block_rate", "latency", "probing", "campaign", "token_length", "volume"),
    ),
    Panel(
        name="block_rate",
        title="Block rate by model",
        answers="Which share of each model's requests is blocked?",
        kind="timeseries",
        unit="ratio",
        sql="""
            SELECT $bucket AS time, model_version AS series, countIf(blocked) / count() AS value
            FROM $events AND model_version != ''
            GROUP BY time, series ORDER BY time, series
            """,
        by="model",
        detectors=("block_rate", "campaign"),
    ),
    Panel(
        name="guards",
        title="Block rate by guard",
        answers="Which share of the requests that a guard judged did it block?",
        kind="timeseries",
        unit="ratio",
        sql="""
            SELECT time, guard AS series, sumIf(requests, arrayExists(
                (name, decision) -> name = guard AND decision = 'block', guard_names, guard_decisions
            )) / sum(requests) AS value
            FROM (
                SELECT $bucket AS time, guard_names, guard_decisions, count() AS requests
                FROM $events
                GROUP BY time, guard_names, guard_decisions
            )
            ARRAY JOIN arrayDistinct(guard_names) AS guard
            GROUP BY time, series ORDER BY time, series
            """,
        by="guard",
        detectors=("block_rate", "probing", "guard_health"),
    ),
    Panel(
        name="latency",
        title="Latency",
        answers="How long do answered requests take, from the first byte in to the last byte out?",
        kind="timeseries",
        unit="ms",
        sql="""
            SELECT $bucket AS time, quantileExact(0.99)(latency_ms) AS p99, quantileExact(0.5)(latency_ms) AS p50
            FROM $events AND $answered
            GROUP BY time ORDER BY time
            """,
        series=(Series(column="p99", label="p99", tone="c2"), Series(column="p50", label="p50", tone="c1")),
        detectors=("latency",),
    ),
    Panel(
        name="first_token",
        title="First token and queue",
        answers="How long until the first token, and how much of that is waiting in the engine's queue?",
        kind="timeseries",
        unit="ms",
        sql="""
            SELECT $bucket AS time, quantileExact(0.99)(ttft_ms) AS ttft_p99, quantileExact(0.5)(ttft_ms) AS ttft_p50,
                quantileExact(0.99)(queue_ms) AS queue_p99
            FROM $events AND $answered AND ttft_ms IS NOT NULL
            GROUP BY time ORDER BY time
            """,
        series=(
            Series(column="ttft_p99", label="first token p99", tone="c2"),
            Series(column="ttft_p50", label="first token p50", tone="c1"),
            Series(column="queue_p99", label="queue p99", tone="c3"),
        ),
        detectors=("latency",),
    ),
    Panel(
        name="tokens",
        title="Tokens in and out",
        answers="How many tokens go in and come out a minute?",
        kind="timeseries",
        unit="tokens_per_minute",
        sql="""
            SELECT $bucket AS time, sum(response_tokens) * 60 / $bucket_s AS tokens_out,
                sum(prompt_tokens) * 60 / $bucket_s AS tokens_in
            FROM $events
            GROUP BY time ORDER BY time
            """,
        series=(Series(column="tokens_out", label="out", tone="c2"), Series(column="tokens_in", label="in", tone="c1")),
        detectors=("token_length", "volume", "cost", "extraction"),
    ),
    Panel(
        name="token_time",
        title="Time per output token",
        answers="How fast does the engine write, once it writes?",
        kind="timeseries",
        unit="ms",
        sql="""
            SELECT $bucket AS time, quantileExact(0.99)(ms_per_output_token) AS p99,
                quantileExact(0.5)(ms_per_output_token) AS p50
            FROM $events AND $answered AND ms_per_output_token IS NOT NULL
            GROUP BY time ORDER BY time
            """,
        series=(Series(column="p99", label="p99", tone="c2"), Series(column="p50", label="p50", tone="c1")),
        detectors=("latency",),
    ),
    Panel(
        name="completion_length",
        title="Completion length",
        answers="How many tokens do answered requests generate?",
        kind="timeseries",
        unit="tokens",
        sql="""
            SELECT $bucket AS time, max(response_tokens) AS longest, quantileExact(0.99)(response_tokens) AS p99,
                quantileExact(0.5)(response_tokens) AS p50
            FROM $events AND $answered
            GROUP BY time ORDER BY time
            """,
        series=(
            Series(column="p99", label="p99", tone="c2"),
            Series(column="p50", label="p50", tone="c1"),
            Series(column="longest", label="longest", tone="grey"),
        ),
        detectors=("token_length",),
    ),
)
TABLES: Final = (
    Panel(
        name="probing_sessions",
        title="Sessions by distinct blocked prompts",
        answers="Which sessions had the most different prompts blocked? A person who rephrases is probing.",
        kind="table",
        sql="""
            SELECT 'session' AS entity_kind, concat(user_id, '/', session_id) AS entity_id,
                uniqExactIf(prompt_hash, blocked) AS prompts, countIf(blocked) AS blocked_requests, count() AS requests,
                max(timestamp) AS last_seen
            FROM $events AND user_id != ''
            GROUP BY user_id, session_id HAVING blocked_requests > 0
            ORDER BY prompts DESC, blocked_requests DESC, entity_id LIMIT 100
            """,
        columns=(
            Column(column="entity_id", label="Session", shown="entity"),
            Column(column="prompts", label="Blocked prompts", shown="number"),
            Column(column="blocked_requests", label="Blocked", shown="number"),
            Column(column="requests", label="Requests", shown="number"),
            Column(column="last_seen", label="Last seen", shown="time"),
        ),
        width=6,
        empty="No session had a request blocked in this time range.",
    ),
    Panel(
        name="busy_sessions",
        title="Sessions by volume",
        answers="Which sessions use the most tokens?",
        kind="table",
        sql="""
            SELECT 'session' AS entity_kind, concat(user_id, '/', session_id) AS entity_id,
                sum(prompt_tokens + response_tokens) AS tokens, sum(response_tokens) AS tokens_out, count() AS requests,
                max(timestamp) AS last_seen
            FROM $events AND user_id != ''
            GROUP BY user_id, session_id
            ORDER BY tokens DESC, entity_id LIMIT 100
            """,
        columns=(
            Column(column="entity_id", label="Session", shown="entity"),
            Column(column="tokens", label="Tokens", shown="number"),
            Column(column="tokens_out", label="Out", shown="number"),
            Column(column="requests", label="Requests", shown="number"),
            Column(column="last_seen", label="Last seen", shown="time"),
        ),
        width=6,
    ),
)
FALSE_ALARMS: Final = Panel(
    name="false_alarms",
    title="False alarms against the budget",
    answers="Of the four weeks before the end of the range: how many findings a week did people call false positives, "
    "and how many does the alert budget give each detector? Young tenants' weeks are counted from their first event.",
    kind="table",
    sql="""
        WITH ages AS (
            SELECT tenant, least(4., greatest(1., dateDiff('second', min(minute), $to) / 604800)) AS weeks
            FROM events_1m WHERE $tenant AND minute >= $to - INTERVAL 28 DAY AND minute < $to GROUP BY tenant
        ),
        told AS (
            SELECT tenant, detector, count() AS findings,
                countIf(JSONExtractBool(json, 'false_positive')) AS called_false
            FROM findings_now
            WHERE $tenant AND first_seen >= $to - INTERVAL 28 DAY AND first_seen < $to
            GROUP BY tenant, detector
        )
        SELECT ages.tenant AS tenant, tupleElement(part, 1) AS detector, told.findings AS findings,
            told.called_false AS called_false, told.called_false / weeks AS a_week,
            $budget_a_week * tupleElement(part, 2) AS budget, a_week / budget AS of_budget
        FROM (SELECT tenant, weeks, arrayJoin($budget_shares) AS part FROM ages) AS ages
        LEFT JOIN told ON told.tenant = ages.tenant AND told.detector = tupleElement(part, 1)
        ORDER BY of_budget DESC, findings DESC, tenant, detector LIMIT 500
        """,
    columns=(
        Column(column="tenant", label="Tenant"),
        Column(column="detector", label="Detector"),
        Column(column="findings", label="Findings", shown="number"),
        Column(column="called_false", label="Called false", shown="number"),
        Column(column="a_week", label="A week", shown="number"),
        Column(column="budget", label="Budget a week", shown="number"),
        Column(column="of_budget", label="Of budget", shown="number", unit="ratio", watch_from=1.0001),
    ),
    width=8,
    empty="No tenant sent requests in the four weeks before.",
)
ACCOUNT: Final = Panel(
    name="account",
    title="Account of the events",
    answers="What is stored, what is on its way, and what was left out and why?",
    kind="status",
    sql="""
        WITH (SELECT sum(lag) FROM process_status WHERE role = 'store') AS waiting,
        (SELECT sum(drops) FROM process_status WHERE role = 'store') AS unusable,
        stored AS (
            SELECT count() AS events, countIf(late) AS late, countIf(duplicate) AS doubled,
                countIf(quarantined) AS quarantined, countIf(status = 'lost') AS lost
            FROM events WHERE $in_range AND $tenant
        )
        SELECT tupleElement(line, 1) AS label, tupleElement(line, 2) AS value, tupleElement(line, 3) AS tone
        FROM stored
        ARRAY JOIN [
            ('stored', toString(events), ''),
            ('on Kafka, not stored yet', toString(waiting), ''),
            ('unusable, in the dead letter', toString(unusable), if(unusable > 0, 'bad', '')),
            ('late: stored after their second was closed', toString(late), if(late > 0, 'watch', '')),
            ('duplicates, left out of the panels', toString(doubled), ''),
            ('quarantined, left out of the panels', toString(quarantined), if(quarantined > 0, 'bad', '')),
            ('lost: begun, and cut off by a crash', toString(lost), if(lost > 0, 'watch', ''))
        ] AS line
        """,
    width=4,
    empty="The store holds no events.",
)
PANELS: Final = (*STATS, FINDINGS, PROCESSES, ACCOUNT, FALSE_ALARMS, *PLOTS, *TABLES)
BY_NAME: Final = {panel.name: panel for panel in PANELS}

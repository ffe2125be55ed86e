-- The store's tables, for ClickHouse 25.8 or newer and for chDB 4. Applied at every start: each statement is idempotent.
-- `:events_days` and the like are filled in from the configuration. Statements end with a semicolon at the line's end.

-- One row for each record of kind inference or rejection: one Kafka record, one row, so that a duplicate stays visible
-- beside the first. Partitions go by the broker's time, never by the collector's: a clock gone wild must not scatter
-- one batch over a thousand partitions. The sorting key ends with the offset: a replayed row replaces itself.
CREATE TABLE IF NOT EXISTS events
(
    timestamp           DateTime64(6, 'UTC')   CODEC(DoubleDelta, ZSTD(1)),
    event_id            String                 CODEC(ZSTD(1)),
    kind                LowCardinality(String),
    schema_version      LowCardinality(String),
    tenant              LowCardinality(String),
    session_id          String                 CODEC(ZSTD(1)),
    user_id             String                 CODEC(ZSTD(1)),
    prompt_hash         String                 CODEC(ZSTD(1)),
    model_version       LowCardinality(String),
    response_tokens     UInt64                 CODEC(T64, ZSTD(1)),
    latency_ms          Float64                CODEC(ZSTD(1)),
    blocked             Bool,
    status              LowCardinality(String),
    http_request_id     String                 CODEC(ZSTD(1)),
    route               LowCardinality(String),
    operation           LowCardinality(String),
    http_status         UInt16                 CODEC(T64, ZSTD(1)),
    finish_reason       LowCardinality(String),
    reason              LowCardinality(String),
    prompt_tokens       UInt64                 CODEC(T64, ZSTD(1)),
    max_tokens          UInt64                 CODEC(T64, ZSTD(1)),
    ttft_ms             Nullable(Float64)      CODEC(ZSTD(1)),
    queue_ms            Nullable(Float64)      CODEC(ZSTD(1)),
    ms_per_output_token Nullable(Float64)      CODEC(ZSTD(1)),
    stream              Bool,
    n                   UInt32                 CODEC(T64, ZSTD(1)),
    adapter_name        Nullable(String)       CODEC(ZSTD(1)),
    adapter_digest      String                 CODEC(ZSTD(1)),
    weights_digest      LowCardinality(String),
    key_id              LowCardinality(String),
    api_key             String                 CODEC(ZSTD(1)),
    client_address      String                 CODEC(ZSTD(1)),
    turn_hash           String                 CODEC(ZSTD(1)),
    system_hash         String                 CODEC(ZSTD(1)),
    minhash             String                 CODEC(ZSTD(1)),
    view                LowCardinality(String),
    key_epoch           LowCardinality(String),
    chain               String                 CODEC(ZSTD(1)),
    trace_id            String                 CODEC(ZSTD(1)),
    tokens_from         LowCardinality(String),
    media               String                 CODEC(ZSTD(1)),
    media_count         UInt64                 CODEC(ZSTD(1)),
    released_chars      UInt64                 CODEC(ZSTD(1)),
    chunks_removed      UInt64                 CODEC(ZSTD(1)),
    guard_names         Array(LowCardinality(String)) CODEC(ZSTD(1)),
    guard_versions      Array(LowCardinality(String)) CODEC(ZSTD(1)),
    guard_stages        Array(LowCardinality(String)) CODEC(ZSTD(1)),
    guard_decisions     Array(LowCardinality(String)) CODEC(ZSTD(1)),
    guard_scores        Array(Float64)         CODEC(ZSTD(1)),
    guard_labels        Array(LowCardinality(String)) CODEC(ZSTD(1)),
    guard_latency_ms    Array(Float64)         CODEC(ZSTD(1)),
    guard_errors        Array(LowCardinality(String)) CODEC(ZSTD(1)),
    collector_id        LowCardinality(String),
    boot                LowCardinality(String),
    seq                 UInt64                 CODEC(Delta, ZSTD(1)),
    kafka_partition     UInt32                 CODEC(ZSTD(1)),
    kafka_offset        UInt64                 CODEC(Delta, ZSTD(1)),
    append_time         DateTime64(3, 'UTC')   CODEC(Delta, ZSTD(1)),
    late                Bool,
    duplicate           Bool,
    quarantined         Bool,
    INDEX by_time timestamp TYPE minmax GRANULARITY 1,
    INDEX by_prompt prompt_hash TYPE bloom_filter(0.01) GRANULARITY 4,
    INDEX by_event event_id TYPE bloom_filter(0.01) GRANULARITY 4,
    INDEX by_session session_id TYPE bloom_filter(0.01) GRANULARITY 4,
    INDEX by_user user_id TYPE bloom_filter(0.01) GRANULARITY 4,
    INDEX by_trace trace_id TYPE bloom_filter(0.01) GRANULARITY 4
)
ENGINE = ReplacingMergeTree
PARTITION BY toYYYYMMDD(append_time)
PRIMARY KEY (tenant, timestamp)
ORDER BY (tenant, timestamp, event_id, kafka_partition, kafka_offset)
TTL toDateTime(append_time) + toIntervalDay(:events_days)
SETTINGS ttl_only_drop_parts = 1, non_replicated_deduplication_window = 10000;

-- A table that an earlier version made gets the columns that came later.
ALTER TABLE events ADD COLUMN IF NOT EXISTS trace_id String CODEC(ZSTD(1)) AFTER chain;
ALTER TABLE events ADD COLUMN IF NOT EXISTS tokens_from LowCardinality(String) AFTER trace_id;
ALTER TABLE events ADD COLUMN IF NOT EXISTS media String CODEC(ZSTD(1)) AFTER tokens_from;
ALTER TABLE events ADD COLUMN IF NOT EXISTS media_count UInt64 CODEC(ZSTD(1)) AFTER media;
ALTER TABLE events ADD COLUMN IF NOT EXISTS released_chars UInt64 CODEC(ZSTD(1)) AFTER media_count;
ALTER TABLE events ADD COLUMN IF NOT EXISTS chunks_removed UInt64 CODEC(ZSTD(1)) AFTER released_chars;
ALTER TABLE events ADD INDEX IF NOT EXISTS by_trace trace_id TYPE bloom_filter(0.01) GRANULARITY 4;

-- The records of lanes that are no events, and any whose bytes the columns above would not give back: with them the
-- chain of a lane is whole, heartbeats aside, and `inferwatch verify` needs nothing else.
CREATE TABLE IF NOT EXISTS lane_records
(
    kafka_partition UInt32               CODEC(ZSTD(1)),
    kafka_offset    UInt64               CODEC(Delta, ZSTD(1)),
    append_time     DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    kind            LowCardinality(String),
    raw             String               CODEC(ZSTD(3))
)
ENGINE = ReplacingMergeTree
PARTITION BY toYYYYMMDD(append_time)
ORDER BY (kafka_partition, kafka_offset)
TTL toDateTime(append_time) + toIntervalDay(:events_days)
SETTINGS ttl_only_drop_parts = 1, non_replicated_deduplication_window = 10000;

-- Minute counters, for panels over days. Late rows count, duplicates and quarantined rows do not. `latency_buckets`
-- counts answered requests by toString(floor(8 * log2(latency_ms + 1))): buckets 9 % wide, which add up exactly.
CREATE TABLE IF NOT EXISTS events_1m
(
    minute          DateTime('UTC') CODEC(DoubleDelta, ZSTD(1)),
    tenant          LowCardinality(String),
    model_version   LowCardinality(String),
    events          SimpleAggregateFunction(sum, UInt64),
    blocked         SimpleAggregateFunction(sum, UInt64),
    rejected        SimpleAggregateFunction(sum, UInt64),
    aborted         SimpleAggregateFunction(sum, UInt64),
    errors          SimpleAggregateFunction(sum, UInt64),
    lost            SimpleAggregateFunction(sum, UInt64),
    late            SimpleAggregateFunction(sum, UInt64),
    prompt_tokens   SimpleAggregateFunction(sum, UInt64),
    response_tokens SimpleAggregateFunction(sum, UInt64),
    latency_ms_max  SimpleAggregateFunction(max, Float64),
    latency_buckets SimpleAggregateFunction(sumMap, Map(String, UInt64))
)
ENGINE = AggregatingMergeTree
PARTITION BY toYYYYMM(minute)
ORDER BY (tenant, model_version, minute)
TTL minute + toIntervalDay(:rollup_days)
SETTINGS ttl_only_drop_parts = 1, non_replicated_deduplication_window = 10000;

CREATE MATERIALIZED VIEW IF NOT EXISTS events_1m_feed TO events_1m AS
SELECT
    toDateTime(intDiv(least(greatest(toUnixTimestamp64Micro(timestamp), 0), 4294967295000000), 60000000) * 60, 'UTC') AS minute,
    tenant,
    model_version,
    count() AS events,
    countIf(blocked) AS blocked,
    countIf(status = 'rejected') AS rejected,
    countIf(status = 'aborted') AS aborted,
    countIf(status = 'error') AS errors,
    countIf(status = 'lost') AS lost,
    countIf(late) AS late,
    sum(prompt_tokens) AS prompt_tokens,
    sum(response_tokens) AS response_tokens,
    maxIf(latency_ms, status IN ('ok', 'blocked_output')) AS latency_ms_max,
    sumMapIf(map(toString(toInt32(floor(8 * log2(latency_ms + 1)))), toUInt64(1)), status IN ('ok', 'blocked_output')) AS latency_buckets
FROM events
WHERE NOT duplicate AND NOT quarantined
GROUP BY minute, tenant, model_version;

-- Every revision of every finding.
CREATE TABLE IF NOT EXISTS findings
(
    uid                     String,
    revision                UInt32,
    state                   LowCardinality(String),
    schema_version          LowCardinality(String),
    tenant                  LowCardinality(String),
    detector                LowCardinality(String),
    detector_version        LowCardinality(String),
    config_digest           LowCardinality(String),
    severity                LowCardinality(String),
    confidence              LowCardinality(String),
    entity_kind             LowCardinality(String),
    entity_id               String,
    model                   LowCardinality(String),
    first_seen              DateTime64(6, 'UTC'),
    last_seen               DateTime64(6, 'UTC'),
    updated                 DateTime64(6, 'UTC'),
    statistic_name          LowCardinality(String),
    statistic_observed      Float64,
    statistic_baseline      Float64,
    statistic_threshold     Float64,
    statistic_unit          LowCardinality(String),
    statistic_improbability Float64,
    counts                  Map(String, Int64),
    summary                 String,
    evidence_event_ids      Array(String),
    evidence_offsets        Array(Tuple(topic String, partition UInt32, first UInt64, last UInt64)),
    evidence_replay         String,
    atlas                   Array(String),
    owasp                   Array(String),
    runbook                 Array(String),
    cold_start              String,
    json                    String CODEC(ZSTD(3))
)
ENGINE = ReplacingMergeTree
ORDER BY (tenant, uid, revision)
TTL toDateTime(updated) + toIntervalDay(:findings_days)
SETTINGS non_replicated_deduplication_window = 10000;

-- The latest revision of each finding.
CREATE VIEW IF NOT EXISTS findings_now AS
SELECT * FROM findings FINAL ORDER BY revision DESC LIMIT 1 BY tenant, uid;

-- The health records of iw.status, the newest of each process once merged.
CREATE TABLE IF NOT EXISTS process_reports
(
    process_id    String,
    role          LowCardinality(String),
    at            DateTime64(3, 'UTC'),
    version       LowCardinality(String),
    config_digest LowCardinality(String),
    lag           Int64,
    watermark     Nullable(DateTime64(6, 'UTC')),
    late          UInt64,
    drops         UInt64,
    json          String CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree(at)
ORDER BY process_id
TTL toDateTime(at) + toIntervalDay(:status_days)
SETTINGS non_replicated_deduplication_window = 1000;

-- The newest health record of each process.
CREATE VIEW IF NOT EXISTS process_status AS
SELECT * FROM process_reports FINAL;

-- One table per kind of record, one row per record of Kafka.
--
-- (topic, partition, offset) names the record; recorded_at is the time of its Kafka message. Tables are split by
-- the month of recorded_at and never by the time of insertion: an insert is recognised as a repetition within one
-- partition only, so a block that is inserted again after midnight must meet the same partition.
--
-- non_replicated_deduplication_window: how many inserted blocks a table remembers by their token. 115 200 is
-- 4 x (8 partitions x 1 block a second x 1 hour of retries).
--
-- The sink counts the rows of a range of offsets after every insert in doubt. So nothing else may add rows under a topic
-- and partition of Kafka that are not its records, and a TTL should leave the last days alone.
--
-- request_key is what uniqExact would compute from request_id; stored, it makes counting a batch three times cheaper.
--
-- Nothing is deleted by default. To keep rows for a year, whole months being dropped at once:
--   ALTER TABLE observations MODIFY TTL toDateTime(recorded_at) + INTERVAL 1 YEAR;
--   ALTER TABLE observations MODIFY SETTING ttl_only_drop_parts = 1;
-- To keep the columns but not the vendor's JSON beyond 90 days:
--   ALTER TABLE observations MODIFY COLUMN raw String CODEC(ZSTD(3)) TTL toDateTime(recorded_at) + INTERVAL 90 DAY;

CREATE TABLE IF NOT EXISTS {database}.requests
(
    topic        LowCardinality(String),
    partition    Int32,
    offset       Int64 CODEC(Delta, ZSTD),
    recorded_at  DateTime64(3, 'UTC') CODEC(Delta, ZSTD),
    request_id   String CODEC(ZSTD),
    source       LowCardinality(String),
    item         String CODEC(ZSTD),
    batch        LowCardinality(String) COMMENT 'empty: submitted without a batch',
    requested_at DateTime64(3, 'UTC') CODEC(Delta, ZSTD) COMMENT 'when it was first asked for',
    expires_at   Nullable(DateTime64(3, 'UTC')),
    calls        UInt32 COMMENT 'calls made before this record: above 0 for a retry',
    params       String CODEC(ZSTD) COMMENT 'JSON object of the parameters of the call; empty if none',
    traceparent  String CODEC(ZSTD),
    request_key  UInt128 MATERIALIZED reinterpretAsUInt128(sipHash128(request_id)),
    INDEX by_item item TYPE bloom_filter GRANULARITY 4,
    INDEX by_request request_id TYPE bloom_filter GRANULARITY 4
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(recorded_at)
ORDER BY (batch, source, recorded_at)
SETTINGS non_replicated_deduplication_window = 115200;

CREATE TABLE IF NOT EXISTS {database}.observations
(
    topic          LowCardinality(String),
    partition      Int32,
    offset         Int64 CODEC(Delta, ZSTD),
    recorded_at    DateTime64(3, 'UTC') CODEC(Delta, ZSTD),
    request_id     String CODEC(ZSTD),
    source         LowCardinality(String),
    item           String CODEC(ZSTD),
    batch          LowCardinality(String) COMMENT 'empty: submitted without a batch',
    requested_at   DateTime64(3, 'UTC') CODEC(Delta, ZSTD),
    fetched_at     DateTime64(3, 'UTC') CODEC(Delta, ZSTD) COMMENT 'when the vendor answered',
    status         LowCardinality(String) COMMENT 'found, absent or off_shelf',
    via            LowCardinality(String) COMMENT 'where the answer came from: call',
    calls          UInt32 COMMENT 'calls it took, the last one included',
    account        LowCardinality(String),
    latency_ms     UInt32,
    title          String CODEC(ZSTD),
    price          Nullable(Decimal(18, 4)),
    price_text     String CODEC(ZSTD) COMMENT 'the price as the vendor wrote it, where that is more than the number: a range (its low end is price), words',
    currency       LowCardinality(String),
    stock          Nullable(Decimal(18, 4)) COMMENT 'NULL where the vendor gave none or no number: see raw',
    sku_info       String CODEC(ZSTD(3)),
    category_id    LowCardinality(String),
    seller_nick    String CODEC(ZSTD),
    rating         Nullable(Decimal(18, 4)),
    reviews        Nullable(Int64),
    vendor_status  LowCardinality(String),
    vendor_updated String CODEC(ZSTD),
    fingerprint    String CODEC(ZSTD) COMMENT 'another value: a watched column has changed',
    raw            String CODEC(ZSTD(3)) COMMENT 'the JSON of the vendor for this item, byte for byte',
    traceparent    String CODEC(ZSTD),
    request_key    UInt128 MATERIALIZED reinterpretAsUInt128(sipHash128(request_id)),
    INDEX by_request request_id TYPE bloom_filter GRANULARITY 4,
    INDEX by_time fetched_at TYPE minmax GRANULARITY 1,
    PROJECTION by_batch (SELECT batch, status, request_key, recorded_at ORDER BY batch)
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(recorded_at)
ORDER BY (source, item, fetched_at)
SETTINGS non_replicated_deduplication_window = 115200;

CREATE TABLE IF NOT EXISTS {database}.failures
(
    topic        LowCardinality(String),
    partition    Int32,
    offset       Int64 CODEC(Delta, ZSTD),
    recorded_at  DateTime64(3, 'UTC') CODEC(Delta, ZSTD),
    request_id   String CODEC(ZSTD),
    source       LowCardinality(String),
    item         String CODEC(ZSTD),
    batch        LowCardinality(String) COMMENT 'empty: submitted without a batch',
    requested_at DateTime64(3, 'UTC') CODEC(Delta, ZSTD),
    failed_at    DateTime64(3, 'UTC') CODEC(Delta, ZSTD),
    calls        UInt32 COMMENT 'calls made for the request, this one included',
    account      LowCardinality(String),
    class        LowCardinality(String) COMMENT 'throttled, outage, denied, malformed or bug',
    code         LowCardinality(String) COMMENT 'the code of the vendor, or ours for transport',
    message      String CODEC(ZSTD),
    http_status  Nullable(UInt16),
    latency_ms   UInt32,
    not_before   Nullable(DateTime64(3, 'UTC')),
    traceparent  String CODEC(ZSTD),
    INDEX by_item item TYPE bloom_filter GRANULARITY 4,
    INDEX by_request request_id TYPE bloom_filter GRANULARITY 4,
    PROJECTION by_batch (SELECT batch, topic, partition, offset, recorded_at ORDER BY batch)
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(recorded_at)
ORDER BY (source, class, failed_at)
SETTINGS non_replicated_deduplication_window = 115200;

CREATE TABLE IF NOT EXISTS {database}.dead_letters
(
    topic            LowCardinality(String),
    partition        Int32,
    offset           Int64 CODEC(Delta, ZSTD),
    recorded_at      DateTime64(3, 'UTC') CODEC(Delta, ZSTD),
    request_id       String CODEC(ZSTD) COMMENT 'of a record that could not be read: topic/partition/offset',
    source           LowCardinality(String) COMMENT 'empty: the record could not be read',
    item             String CODEC(ZSTD),
    batch            LowCardinality(String) COMMENT 'empty: submitted without a batch, or unreadable',
    requested_at     Nullable(DateTime64(3, 'UTC')),
    died_at          DateTime64(3, 'UTC') CODEC(Delta, ZSTD),
    reason           LowCardinality(String) COMMENT 'exhausted, permanent, expired, cancelled, budget or invalid',
    message          String CODEC(ZSTD),
    calls            UInt32,
    last_class       LowCardinality(String) COMMENT 'class and code of the last failed call; empty if there was none',
    last_code        LowCardinality(String),
    origin_topic     LowCardinality(String) COMMENT 'the record that was given up',
    origin_partition Int32,
    origin_offset    Int64,
    request          String CODEC(ZSTD(3)) COMMENT 'JSON of the request with its whole history, if it could be read',
    original         String CODEC(ZSTD(3)) COMMENT 'the bytes of a record that could not be read',
    traceparent      String CODEC(ZSTD),
    request_key      UInt128 MATERIALIZED reinterpretAsUInt128(sipHash128(request_id)),
    INDEX by_item item TYPE bloom_filter GRANULARITY 4,
    INDEX by_request request_id TYPE bloom_filter GRANULARITY 4
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(recorded_at)
ORDER BY (batch, source, died_at)
SETTINGS non_replicated_deduplication_window = 115200;

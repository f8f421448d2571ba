-- Changes of watched columns, as the topic of changes has them: decided once, against the observation before, and stored
-- like every other record. Until now they were worked out anew by each query, from all observations.

CREATE TABLE IF NOT EXISTS {database}.item_changes
(
    topic       LowCardinality(String),
    partition   Int32,
    offset      Int64 CODEC(Delta, ZSTD),
    recorded_at DateTime64(3, 'UTC') CODEC(Delta, ZSTD),
    source      LowCardinality(String),
    item        String CODEC(ZSTD),
    field       LowCardinality(String) COMMENT 'status, price, title, stock or rating',
    old         String CODEC(ZSTD) COMMENT 'as the vendor wrote it; empty: there was none',
    new         String CODEC(ZSTD),
    old_number  Nullable(Decimal(18, 4)) COMMENT 'NULL: no number, or none that fits',
    new_number  Nullable(Decimal(18, 4)),
    currency    LowCardinality(String) COMMENT 'of a price',
    old_at      DateTime64(3, 'UTC') CODEC(Delta, ZSTD) COMMENT 'when the old value was last seen',
    new_at      DateTime64(3, 'UTC') CODEC(Delta, ZSTD) COMMENT 'when the new value was first seen',
    batch       LowCardinality(String) COMMENT 'of the request whose answer brought it; empty: none',
    request_id  String CODEC(ZSTD),
    traceparent String CODEC(ZSTD),
    INDEX by_time new_at TYPE minmax GRANULARITY 1
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(recorded_at)
ORDER BY (source, item, new_at, field)
SETTINGS non_replicated_deduplication_window = 115200;

CREATE MATERIALIZED VIEW IF NOT EXISTS {database}.item_times_from_changes TO {database}.item_times AS
SELECT source, item, max(new_at) AS changed_at
FROM {database}.item_changes
GROUP BY source, item;

CREATE OR REPLACE VIEW {database}.changes AS
SELECT source, item, field, old, new, old_number, new_number, currency, old_at, new_at, batch, request_id
FROM {database}.item_changes;

-- What the changes stage remembers of each item: the newest observation that it has compared.
CREATE TABLE IF NOT EXISTS {database}.item_watched
(
    source      LowCardinality(String),
    item        String CODEC(ZSTD),
    fetched_at  DateTime64(3, 'UTC') COMMENT 'of the newest observation',
    found_at    Nullable(DateTime64(3, 'UTC')) COMMENT 'of the newest one that found it: price to rating are from there',
    status      LowCardinality(String),
    fingerprint String CODEC(ZSTD),
    price       String CODEC(ZSTD),
    title       String CODEC(ZSTD),
    stock       String CODEC(ZSTD),
    rating      String CODEC(ZSTD)
)
ENGINE = ReplacingMergeTree(fetched_at)
ORDER BY (source, item)
SETTINGS non_replicated_deduplication_window = 115200;

-- Days begin at midnight in the time zone that is asked for:
--   SELECT * FROM daily(time_zone = 'Asia/Shanghai') WHERE day >= today() - 7
CREATE VIEW IF NOT EXISTS {database}.daily AS
SELECT
    source,
    toDate(fetched_at, {time_zone: String}) AS day,
    count() AS observations,
    uniqExact(item) AS items,
    countIf(status = 'found') AS found,
    countIf(status = 'absent') AS absent,
    countIf(status = 'off_shelf') AS off_shelf,
    min(price) AS cheapest,
    quantileExact(0.5)(price) AS median_price,
    max(price) AS dearest
FROM {database}.observations
GROUP BY source, day;

-- The last known price of each item on each day, in the time zone that is asked for.
CREATE VIEW IF NOT EXISTS {database}.daily_prices AS
SELECT
    source,
    item,
    toDate(fetched_at, {time_zone: String}) AS day,
    argMax(price, fetched_at) AS last_price,
    argMax(currency, fetched_at) AS last_currency,
    max(fetched_at) AS last_at
FROM {database}.observations
WHERE status = 'found' AND price IS NOT NULL
GROUP BY source, item, day;

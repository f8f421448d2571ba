-- What people ask: how far is my batch, what has changed, how is the vendor.

-- Progress of each batch (made anew by 006_batches.sql). Distinct requests are counted, not rows: a retried request
-- stands on its topic again.
-- failed counts failed calls, retried the requests that were tried again. The sink reads the topics independently, so
-- for a moment more may be answered than is known to be asked for.
CREATE VIEW IF NOT EXISTS {database}.batches AS
SELECT
    batch,
    uniqExactIf(request_key, kind = 'request') AS requested,
    uniqExactIf(request_key, kind = 'found') AS found,
    uniqExactIf(request_key, kind = 'absent') AS absent,
    uniqExactIf(request_key, kind = 'off_shelf') AS off_shelf,
    uniqExactIf(request_key, kind = 'failure') AS failed,
    uniqExactIf(request_key, again) AS retried,
    uniqExactIf(request_key, kind = 'dead') AS dead,
    toUInt64(greatest(0, toInt64(requested) - toInt64(found + absent + off_shelf + dead))) AS under_way,
    min(at) AS first_at,
    max(at) AS last_at
FROM
(
    SELECT batch, 'request' AS kind, request_key, calls > 0 AS again, recorded_at AS at FROM {database}.requests
    UNION ALL
    SELECT batch, status::String AS kind, request_key, false AS again, recorded_at AS at FROM {database}.observations
    UNION ALL
    -- A failure is known by its record: one request may have several.
    SELECT batch, 'failure' AS kind, reinterpretAsUInt128(sipHash128(topic, partition, offset)) AS request_key,
        false AS again, recorded_at AS at FROM {database}.failures
    UNION ALL
    SELECT batch, 'dead' AS kind, request_key, false AS again, recorded_at AS at FROM {database}.dead_letters
)
WHERE batch != ''
GROUP BY batch;

-- (Made anew by 005_changes.sql.) Old and new value of each watched column, found observation against the found one before it; the status against
-- the observation before. The first observation of an item is no change.
CREATE VIEW IF NOT EXISTS {database}.changes AS
SELECT source, item, change.1 AS field, change.2 AS old, change.3 AS new, change.4 AS old_at, fetched_at AS new_at, request_id
FROM
(
    SELECT
        source, item, fetched_at, request_id,
        arrayFilter(c -> c.2 != c.3,
            arrayConcat(
                if(any_number > 1, [('status', toString(old_status), toString(status), any_at)], []),
                if(status = 'found' AND same_number > 1, [
                    ('price', old_price, price_now, same_at),
                    ('title', old_title, title, same_at),
                    ('stock', old_stock, stock_now, same_at),
                    ('rating', old_rating, rating_now, same_at)], []))) AS changed
    FROM
    (
        SELECT
            source, item, fetched_at, request_id, status, title,
            if(price_text = '', ifNull(toString(price), ''), price_text) AS price_now,
            ifNull(toString(stock), '') AS stock_now,
            ifNull(toString(rating), '') AS rating_now,
            row_number() OVER every AS any_number,
            any(fetched_at) OVER before AS any_at,
            any(status) OVER before AS old_status,
            row_number() OVER every_same AS same_number,
            any(fetched_at) OVER before_same AS same_at,
            any(price_now) OVER before_same AS old_price,
            any(title) OVER before_same AS old_title,
            any(stock_now) OVER before_same AS old_stock,
            any(rating_now) OVER before_same AS old_rating
        FROM {database}.observations
        WINDOW
            every AS (PARTITION BY source, item ORDER BY fetched_at, offset),
            before AS (PARTITION BY source, item ORDER BY fetched_at, offset ROWS BETWEEN 1 PRECEDING AND 1 PRECEDING),
            every_same AS (PARTITION BY source, item, status = 'found' ORDER BY fetched_at, offset),
            before_same AS (PARTITION BY source, item, status = 'found' ORDER BY fetched_at, offset
                ROWS BETWEEN 1 PRECEDING AND 1 PRECEDING)
    )
)
ARRAY JOIN changed AS change;

-- How the vendor does, minute by minute: each call for an item counts, and lands under the class of what it came to.
CREATE VIEW IF NOT EXISTS {database}.source_health AS
SELECT
    source,
    toStartOfMinute(at) AS minute,
    count() AS calls,
    countIf(outcome = 'found') AS found,
    countIf(outcome = 'absent') AS absent,
    countIf(outcome = 'off_shelf') AS off_shelf,
    countIf(outcome = 'throttled') AS throttled,
    countIf(outcome = 'outage') AS outage,
    countIf(outcome = 'denied') AS denied,
    countIf(outcome = 'malformed') AS malformed,
    countIf(outcome = 'bug') AS bug,
    round(quantile(0.5)(latency_ms)) AS latency_ms_p50,
    round(quantile(0.95)(latency_ms)) AS latency_ms_p95,
    round(quantile(0.99)(latency_ms)) AS latency_ms_p99
FROM
(
    SELECT source, fetched_at AS at, status::String AS outcome, latency_ms FROM {database}.observations WHERE via = 'call'
    UNION ALL
    SELECT source, failed_at AS at, class::String AS outcome, latency_ms FROM {database}.failures
)
GROUP BY source, minute;

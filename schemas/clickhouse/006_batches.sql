-- Where each request is, and the progress of each batch made of that.
--
-- A record that begins a chain (calls = 0; a retry has made some) asks once, a result or a dead letter ends it once. A
-- request that was asked for more often than it has ended is still open, also if it had an answer or had died before:
-- its batch was enqueued again, or its dead letter redriven. Otherwise it is what its last end says.

-- The status of each request: waiting (no call has failed yet), under_way (will be tried again), found, absent,
-- off_shelf or dead. The sink reads the topics independently: for a moment an end may be known before its request.
CREATE VIEW IF NOT EXISTS {database}.item_status AS
SELECT
    source, item, batch, request_id,
    multiIf(asked <= ended, last_end, failed_at >= asked_at, 'under_way', 'waiting') AS status,
    asked_at,
    changed_at
FROM
(
    SELECT
        batch, request_id,
        any(source) AS source,
        anyIf(item, item != '') AS item,
        countIf(kind = 'asked') AS asked,
        countIf(kind NOT IN ('asked', 'failed')) AS ended,
        argMaxIf(kind, at, kind NOT IN ('asked', 'failed')) AS last_end,
        maxIf(at, kind = 'asked') AS asked_at,
        maxIf(at, kind = 'failed') AS failed_at,
        max(at) AS changed_at
    FROM
    (
        SELECT batch, source, item, request_id, 'asked' AS kind, recorded_at AS at FROM {database}.requests WHERE calls = 0
        UNION ALL
        SELECT batch, source, item, request_id, 'failed' AS kind, recorded_at AS at FROM {database}.failures
        UNION ALL
        SELECT batch, source, item, request_id, status::String AS kind, recorded_at AS at FROM {database}.observations
        UNION ALL
        SELECT batch, source, item, request_id, 'dead' AS kind, recorded_at AS at FROM {database}.dead_letters
    )
    GROUP BY batch, request_id
    HAVING asked + ended > 0
);

DROP VIEW IF EXISTS {database}.batches;

-- Progress of each batch, counted in requests: each is in one place, so that requested = found + absent + off_shelf +
-- dead + under_way. failed counts failed calls, retried the requests that were tried again.
CREATE VIEW IF NOT EXISTS {database}.batches AS
SELECT
    batch,
    countIf(is_request) AS requested,
    countIf(status = 'found') AS found,
    countIf(status = 'absent') AS absent,
    countIf(status = 'off_shelf') AS off_shelf,
    sum(failures) AS failed,
    countIf(again) AS retried,
    countIf(status = 'dead') AS dead,
    countIf(status = 'open') AS under_way,
    min(first) AS first_at,
    max(last) AS last_at
FROM
(
    SELECT
        batch, request_key,
        countIf(kind = 'asked') AS asked,
        countIf(kind NOT IN ('asked', 'again', 'failed')) AS ended,
        asked + ended > 0 AS is_request,
        multiIf(NOT is_request, '', asked > ended, 'open', argMaxIf(kind, at, kind NOT IN ('asked', 'again', 'failed'))) AS status,
        countIf(kind = 'failed') AS failures,
        countIf(kind = 'again') > 0 AS again,
        min(at) AS first,
        max(at) AS last
    FROM
    (
        SELECT batch, if(calls = 0, 'asked', 'again') AS kind, request_key, recorded_at AS at FROM {database}.requests
        UNION ALL
        SELECT batch, status::String AS kind, request_key, recorded_at AS at FROM {database}.observations
        UNION ALL
        -- Only counted: one group for all of them.
        SELECT batch, 'failed' AS kind, toUInt128(0) AS request_key, recorded_at AS at FROM {database}.failures
        UNION ALL
        SELECT batch, 'dead' AS kind, request_key, recorded_at AS at FROM {database}.dead_letters
    )
    GROUP BY batch, request_key
)
WHERE batch != ''
GROUP BY batch;

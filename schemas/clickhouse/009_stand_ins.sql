-- Answers of a source that stood in for another one (fallback): for which. And what via can be, since there is a cache.

ALTER TABLE {database}.observations
    ADD COLUMN IF NOT EXISTS instead_of LowCardinality(String) DEFAULT ''
    COMMENT 'the source that was asked first and did not answer; empty: source itself was asked' AFTER source;

ALTER TABLE {database}.observations COMMENT COLUMN IF EXISTS via
'call: a call for this request; cache: an answer that was kept, or that came for another request at the same time (fetched_at is when the vendor gave it); stale: the same since the call failed';

-- As before; source is the one that was asked, ended_by the one whose answer or dead letter ended the request: another if
-- that stood in.
CREATE OR REPLACE VIEW {database}.item_status AS
SELECT
    if(asked_of != '', asked_of, any_of) AS source,
    item, batch, request_id,
    multiIf(asked <= ended, last_end, failed_at >= asked_at, 'under_way', 'waiting') AS status,
    asked_at,
    changed_at,
    if(asked <= ended, last_by, '') AS ended_by
FROM
(
    SELECT
        batch, request_id,
        anyIf(owner, kind = 'asked') AS asked_of,
        any(owner) AS any_of,
        anyIf(item, item != '') AS item,
        countIf(kind = 'asked') AS asked,
        countIf(kind NOT IN ('asked', 'failed')) AS ended,
        argMaxIf(kind, at, kind NOT IN ('asked', 'failed')) AS last_end,
        argMaxIf(by, at, kind NOT IN ('asked', 'failed')) AS last_by,
        maxIf(at, kind = 'asked') AS asked_at,
        maxIf(at, kind = 'failed') AS failed_at,
        max(at) AS changed_at
    FROM
    (
        SELECT batch, source::String AS owner, '' AS by, item, request_id, 'asked' AS kind, recorded_at AS at
        FROM {database}.requests WHERE calls = 0
        UNION ALL
        SELECT batch, source::String AS owner, '' AS by, item, request_id, 'failed' AS kind, recorded_at AS at
        FROM {database}.failures
        UNION ALL
        SELECT batch, if(instead_of = '', source, instead_of)::String AS owner, source::String AS by, item, request_id,
            status::String AS kind, recorded_at AS at
        FROM {database}.observations
        UNION ALL
        SELECT batch, source::String AS owner, source::String AS by, item, request_id, 'dead' AS kind, recorded_at AS at
        FROM {database}.dead_letters
    )
    GROUP BY batch, request_id
    HAVING asked + ended > 0
);

-- As before, and how many of the answers were given in place of another source's.
CREATE OR REPLACE VIEW {database}.source_health AS
SELECT
    source,
    toStartOfMinute(at) AS minute,
    countIf(how = 'call') AS calls,
    countIf(how = 'call' AND outcome = 'found') AS found,
    countIf(how = 'call' AND outcome = 'absent') AS absent,
    countIf(how = 'call' AND outcome = 'off_shelf') AS off_shelf,
    countIf(how = 'call' AND outcome = 'throttled') AS throttled,
    countIf(how = 'call' AND outcome = 'outage') AS outage,
    countIf(how = 'call' AND outcome = 'denied') AS denied,
    countIf(how = 'call' AND outcome = 'malformed') AS malformed,
    countIf(how = 'call' AND outcome = 'bug') AS bug,
    if(calls > 0, round(quantileIf(0.5)(latency_ms, how = 'call')), NULL) AS latency_ms_p50,
    if(calls > 0, round(quantileIf(0.95)(latency_ms, how = 'call')), NULL) AS latency_ms_p95,
    if(calls > 0, round(quantileIf(0.99)(latency_ms, how = 'call')), NULL) AS latency_ms_p99,
    countIf(how = 'cache') AS cached,
    countIf(how = 'stale') AS stale,
    countIf(how = 'held') AS held_back,
    countIf(is_stand_in) AS stood_in
FROM
(
    -- fetched_at of an answer that is given again is of long ago.
    SELECT source, if(via = 'call', fetched_at, recorded_at) AS at, via::String AS how, status::String AS outcome, latency_ms,
        instead_of != '' AS is_stand_in
    FROM {database}.observations
    UNION ALL
    SELECT source, failed_at AS at, if(startsWith(code, 'weir.held.'), 'held', 'call') AS how, class::String AS outcome,
        latency_ms, false AS is_stand_in
    FROM {database}.failures
)
GROUP BY source, minute;

-- What came of requests, minute by minute: calls, and since there is a cache and a breaker, what needed no call. An answer
-- for many requests counts for each of them.

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
    countIf(how = 'held') AS held_back
FROM
(
    -- fetched_at of an answer that is given again is of long ago.
    SELECT source, if(via = 'call', fetched_at, recorded_at) AS at, via::String AS how, status::String AS outcome, latency_ms
    FROM {database}.observations
    UNION ALL
    SELECT source, failed_at AS at, if(startsWith(code, 'weir.held.'), 'held', 'call') AS how, class::String AS outcome, latency_ms
    FROM {database}.failures
)
GROUP BY source, minute;

-- Success: the share of calls that brought an answer, hour by hour (the last 24)
SELECT
    source, toStartOfHour(minute) AS hour, sum(calls) AS all_calls, sum(found + absent + off_shelf) AS answered,
    round(100 * answered / greatest(all_calls, 1), 2) AS percent, sum(throttled) AS throttles, max(latency_ms_p99) AS latency_ms_p99_worst
FROM source_health
GROUP BY source, hour
ORDER BY hour DESC, source
LIMIT 24;

-- Latency: how fast the vendor answered, minute by minute (the last ten)
SELECT source, minute, calls, calls - found - absent - off_shelf AS failed, latency_ms_p50, latency_ms_p95, latency_ms_p99
FROM source_health
WHERE calls > 0
ORDER BY minute DESC, source
LIMIT 10;

-- Accounts: the slowest five
SELECT source, account, count() AS calls, round(avg(latency_ms)) AS latency_ms_mean, max(latency_ms) AS latency_ms_max
FROM observations
WHERE via = 'call' AND account != ''
GROUP BY source, account
ORDER BY latency_ms_mean DESC, source, account
LIMIT 5;

-- Outcomes: what the requests came to
SELECT source, outcome, count() AS requests, round(100 * requests / sum(requests) OVER (PARTITION BY source), 1) AS percent
FROM
(
    SELECT DISTINCT source, status::String AS outcome, request_id FROM observations
    UNION ALL
    SELECT DISTINCT source, 'dead: ' || reason AS outcome, request_id FROM dead_letters
)
GROUP BY source, outcome
ORDER BY source, requests DESC, outcome;

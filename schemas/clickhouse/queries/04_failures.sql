-- Failures: why calls brought no answer, by class and code
SELECT source, class, code, count() AS calls, uniqExact(item) AS items, any(message) AS example
FROM failures
GROUP BY source, class, code
ORDER BY calls DESC, source, class, code
LIMIT 20;

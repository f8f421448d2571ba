-- Freshness: how long ago each item was last seen
SELECT
    source,
    multiIf(age < 600, '1: under 10 minutes', age < 3600, '2: under an hour', age < 86400, '3: under a day', '4: older')
        AS seen,
    count() AS items
FROM (SELECT source, dateDiff('second', fetched_at, now64(3)) AS age FROM items)
GROUP BY source, seen
ORDER BY source, seen;

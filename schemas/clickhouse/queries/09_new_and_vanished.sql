-- New and vanished: items first found in the last seven days, and items that were found before and are no longer
SELECT
    source, if(status = 'found', 'new', 'vanished') AS what, item, title,
    if(status = 'found', first_seen_at, seen_at) AS at, status
FROM items
WHERE (status = 'found' AND first_seen_at >= now() - INTERVAL 7 DAY)
    OR (status != 'found' AND seen_at IS NOT NULL AND fetched_at >= now() - INTERVAL 7 DAY)
ORDER BY source, what, at DESC, item
LIMIT 50;

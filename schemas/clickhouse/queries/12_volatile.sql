-- Volatile: the items that change most often, so those worth asking for more often
SELECT source, item, count() AS changes, countIf(field = 'price') AS prices, countIf(field = 'stock') AS stocks, max(new_at) AS last_at
FROM changes
WHERE new_at >= now() - INTERVAL 30 DAY
GROUP BY source, item
ORDER BY changes DESC, source, item
LIMIT 20;

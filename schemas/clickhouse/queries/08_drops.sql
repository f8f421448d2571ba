-- Biggest drops: the prices that have fallen most in the last seven days, against the first price of those days
SELECT
    changes.source AS source, changes.item AS item, any(items.title) AS title, any(currency) AS currency,
    argMin(old_number, new_at) AS was, argMax(new_number, new_at) AS is,
    round(100 * (toFloat64(is) / toFloat64(was) - 1), 1) AS percent
FROM changes
ANY LEFT JOIN items USING (source, item)
WHERE field = 'price' AND new_at >= now() - INTERVAL 7 DAY AND old_number > 0 AND new_number IS NOT NULL
GROUP BY source, item
HAVING is < was
ORDER BY percent, source, item
LIMIT 20;

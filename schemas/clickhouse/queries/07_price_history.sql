-- Price history: every price of the ten items whose price has changed most often, oldest first
SELECT source, item, new_at AS since, old_number AS was, new_number AS is, currency
FROM changes
WHERE field = 'price'
    AND (source, item) IN (
        SELECT source, item FROM changes WHERE field = 'price' GROUP BY source, item ORDER BY count() DESC, source, item LIMIT 10)
ORDER BY source, item, since;

-- Prices: the cheapest, the median and the dearest of the items found
SELECT
    source, currency, count() AS items,
    min(price) AS cheapest, argMin(item, (price, item)) AS cheapest_item,
    quantileExact(0.5)(price) AS median,
    max(price) AS dearest, argMax(item, (price, item)) AS dearest_item
FROM items
WHERE status = 'found' AND price IS NOT NULL
GROUP BY source, currency
ORDER BY source, items DESC;

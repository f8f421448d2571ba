-- Sellers: who offers most of the items found, and at what prices
SELECT
    source, if(seller_nick = '', '(unknown)', seller_nick) AS seller, count() AS items,
    round(100 * items / sum(items) OVER (PARTITION BY source), 1) AS percent,
    quantileExact(0.5)(price) AS median_price, round(avg(rating), 2) AS rating
FROM items
WHERE status = 'found'
GROUP BY source, seller
ORDER BY source, items DESC, seller
LIMIT 20;

-- Further columns of a source's own: what its configuration names beside those that all sources share ([source.columns]).

ALTER TABLE {database}.observations
    ADD COLUMN IF NOT EXISTS further Map(LowCardinality(String), String) CODEC(ZSTD)
    COMMENT 'columns of the source alone, by name, as text' AFTER vendor_updated;

ALTER TABLE {database}.items_latest
    ADD COLUMN IF NOT EXISTS further Map(LowCardinality(String), String) CODEC(ZSTD)
    COMMENT 'columns of the source alone, by name, as text' AFTER vendor_updated;

-- In place, so that there is no moment in which rows come and no view.
ALTER TABLE {database}.items_latest_from_observations
MODIFY QUERY SELECT
    source, item, fetched_at, status, title, price, price_text, currency, stock, sku_info, category_id, seller_nick,
    rating, reviews, vendor_status, vendor_updated, further, fingerprint, batch, request_id
FROM {database}.observations;

-- As before: a view has the columns that were there when it was made.
CREATE OR REPLACE VIEW {database}.items AS
SELECT latest.*, times.first_seen_at, times.seen_at, times.changed_at
FROM {database}.items_latest AS latest FINAL
ANY LEFT JOIN
(
    SELECT source, item, min(first_seen_at) AS first_seen_at, max(seen_at) AS seen_at, max(changed_at) AS changed_at
    FROM {database}.item_times
    GROUP BY source, item
) AS times USING (source, item);

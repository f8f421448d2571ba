-- The newest observation of each item. Read it with FINAL: old rows go when parts are merged.
--
-- An insert is not atomic with its views: a server that dies in between leaves rows in observations that never came
-- here. So after every insert in doubt the sink feeds the block's rows to each view again. The same row twice is
-- harmless in a ReplacingMergeTree, and so every table that a view here feeds has to be one (or a table that the same
-- row can be added to twice): there at least once is enough.
--
-- Not split by month, since an item's rows of two months would then never meet in a merge. The window is its own:
-- without it an insert that is retried would be known to observations, and doubled here.

CREATE TABLE IF NOT EXISTS {database}.items
(
    source         LowCardinality(String),
    item           String CODEC(ZSTD),
    fetched_at     DateTime64(3, 'UTC'),
    status         LowCardinality(String),
    title          String CODEC(ZSTD),
    price          Nullable(Decimal(18, 4)),
    price_text     String CODEC(ZSTD),
    currency       LowCardinality(String),
    stock          Nullable(Decimal(18, 4)),
    sku_info       String CODEC(ZSTD(3)),
    category_id    LowCardinality(String),
    seller_nick    String CODEC(ZSTD),
    rating         Nullable(Decimal(18, 4)),
    reviews        Nullable(Int64),
    vendor_status  LowCardinality(String),
    vendor_updated String CODEC(ZSTD),
    fingerprint    String CODEC(ZSTD),
    batch          LowCardinality(String),
    request_id     String CODEC(ZSTD)
)
ENGINE = ReplacingMergeTree(fetched_at)
ORDER BY (source, item)
SETTINGS non_replicated_deduplication_window = 115200;

CREATE MATERIALIZED VIEW IF NOT EXISTS {database}.items_from_observations TO {database}.items AS
SELECT
    source, item, fetched_at, status, title, price, price_text, currency, stock, sku_info, category_id, seller_nick,
    rating, reviews, vendor_status, vendor_updated, fingerprint, batch, request_id
FROM {database}.observations;

-- Which ends of batches the webhook of [batches] has taken. The row without a batch: since when ends are told at all, so
-- that the first start does not tell those of years.

CREATE TABLE IF NOT EXISTS {database}.batch_ends
(
    batch    String COMMENT 'empty: the beginning',
    ended_at DateTime64(3, 'UTC') COMMENT 'the last record of the batch when its end was told',
    told_at  DateTime64(3, 'UTC')
)
ENGINE = ReplacingMergeTree(ended_at)
ORDER BY batch
SETTINGS non_replicated_deduplication_window = 1000;

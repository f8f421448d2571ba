//! `[kafka]`: the brokers, and the settings of every Kafka client in this process.

use std::{collections::BTreeMap, time::Duration};

use bytesize::ByteSize;
use rdkafka::{ClientConfig, config::RDKafkaLogLevel};
use serde::{Deserialize, Serialize};

use super::log_names::Logs;
use crate::runtime::backoff::Backoff;

/// `[kafka]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `host:port`, several separated by commas.
    pub brokers: String,
    /// What every consumer group's name begins with.
    pub group_prefix: String,
    /// The largest record that is written, before compression, and what `topics apply` sets as each topic's
    /// `max.message.bytes`; at most 16 MiB. Managed clusters often allow 8 MiB.
    pub record_limit: ByteSize,
    /// Any librdkafka property (`security.protocol`, `sasl.username`, …), passed to every client as it is.
    pub properties: BTreeMap<String, String>,
    /// What the logs of topics are called; not a setting.
    #[serde(skip)]
    pub logs: Logs,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            brokers: "127.0.0.1:9092".to_owned(),
            group_prefix: "weir".to_owned(),
            record_limit: ByteSize::b(MESSAGE_LIMIT as u64),
            properties: BTreeMap::new(),
            logs: Logs::default(),
        }
    }
}

/// How long the broker waits for a sign of life before it gives a member's partitions to another.
pub const SESSION_TIMEOUT: Duration = Duration::from_secs(6);

/// How long an open transaction may stand before the broker rolls it back. While it stands, every
/// `read_committed` reader of its topics waits.
pub const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(10);

/// Between questions to a broker that answers at once, but not with what is needed.
pub(super) const BROKER_PAUSES: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(1));

/// The longest record, in bytes, for producers and topics alike: the longest reply of a vendor
/// ([`crate::platform::http::BODY_LIMIT`]) byte for byte, its variants once more with every quote escaped, and
/// room for the rest.
pub const MESSAGE_LIMIT: usize = 16 * 1024 * 1024;

/// The least that `record_limit` may be: a dead letter with the bytes of an unreadable record has to have room.
pub const LEAST_LIMIT: usize = 128 * 1024;

/// How many bytes a producer gathers into one batch, which a broker judges as a whole.
const BATCH: usize = 1_000_000;

/// How far a consumer reads ahead of each partition, unless `properties` sets it.
const READ_AHEAD: [(&str, &str); 4] = [
    // 14 MiB instead of 87 with a million IDs waiting.
    ("queued.min.messages", "2000"),
    ("queued.max.messages.kbytes", "8192"),
    // A partition that has that much is left alone for so long: by default for a second, in which it runs dry.
    ("fetch.queue.backoff.ms", "20"),
    ("fetch.wait.max.ms", "100"),
];

impl Config {
    /// `record_limit` in bytes.
    #[must_use]
    pub fn record_limit(&self) -> usize {
        usize::try_from(self.record_limit.as_u64()).unwrap_or(MESSAGE_LIMIT).clamp(LEAST_LIMIT, MESSAGE_LIMIT)
    }

    /// What all clients share. The user's `properties` win over ours, except where a role sets what it rests on after.
    pub(super) fn base(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.brokers)
            .set("client.id", "weir")
            .set("socket.nagle.disable", "true")
            // A broker that is away for long should not be asked more often than this.
            .set("reconnect.backoff.max.ms", "5000")
            .set_log_level(RDKafkaLogLevel::Warning);
        for (key, value) in &self.properties {
            config.set(key, value);
        }
        config
    }

    /// A member of `group`, named `instance` for good (static membership): a restart under the same name gets
    /// its partitions back at once.
    pub(super) fn consumer(&self, group: &str, instance: &str) -> ClientConfig {
        let mut config = self.base();
        config
            .set("group.id", group)
            .set("group.instance.id", instance)
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("session.timeout.ms", SESSION_TIMEOUT.as_millis().to_string())
            .set("heartbeat.interval.ms", "1500")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            // Each start is told its offset; a lost offset must be seen, not silently jumped over.
            .set("auto.offset.reset", "error")
            // Only then does a fetch of committed offsets wait for the previous owner's open transaction.
            .set("isolation.level", "read_committed");
        for (key, value) in READ_AHEAD.into_iter().filter(|(key, _)| !self.properties.contains_key(*key)) {
            config.set(key, value);
        }
        config
    }

    /// A producer whose writes survive the loss of a broker and are never doubled by a resend.
    pub(super) fn producer(&self) -> ClientConfig {
        let mut config = self.base();
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("compression.type", "lz4")
            .set("linger.ms", "5")
            // The same partition for a key as Java's client.
            .set("partitioner", "murmur2_random")
            .set("message.max.bytes", self.record_limit().to_string())
            .set("batch.size", self.record_limit().min(BATCH).to_string())
            .set("queue.buffering.max.messages", "200000");
        config
    }

    /// A transactional producer under a stable name: a second one with the same name fences the first.
    pub(super) fn transactional(&self, name: &str) -> ClientConfig {
        let mut config = self.producer();
        config
            .set("transactional.id", name)
            .set("transaction.timeout.ms", TRANSACTION_TIMEOUT.as_millis().to_string())
            .set("message.timeout.ms", "8000")
            // AddOffsetsToTxn right after a commit is refused once and waits this long: 12 ms instead of 120.
            .set("retry.backoff.ms", "10")
            // The records of a transaction are handed over at once: waiting for more only adds delay.
            .set("linger.ms", "0");
        config
    }
}

//! Reads bounded offset ranges of partitions, one after the other, without a consumer group.

use std::{collections::BTreeSet, ops::Range, sync::Arc, time::Duration};

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    types::RDKafkaErrorCode,
};
use tokio::{sync::mpsc, time::Instant};

use super::{
    Committed, Partition, Record,
    admin::AdminError,
    ask::{ASK, End, blocking, consumer, gather, partitions},
    client::Config,
    commit_mark,
    logs::{self, Noting},
    topic_ids::{self, TopicIds},
};
use crate::runtime::clock::Timestamp;

/// Pieces that may wait: with the bytes of a piece, the bound of what a slow reader keeps in memory.
const PIECES: usize = 4;
/// How long the brokers may bring nothing before the job is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long an open transaction may hold back the records that stand before the end: beyond its time-out the
/// brokers roll it back.
const SETTLE: Duration = Duration::from_secs(30);

/// Why a piece could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The brokers bring nothing, or refuse.
    #[error("reading {partition} from offset {offset}: {reason}")]
    Failed {
        /// Which partition.
        partition: Partition,
        /// How far it was read.
        offset: i64,
        /// What Kafka said.
        reason: String,
    },
    /// Retention has deleted records that were to be read.
    #[error("{partition}: records from offset {offset} on have been deleted by retention meanwhile; run this again")]
    Gone {
        /// Which partition.
        partition: Partition,
        /// How far it was read.
        offset: i64,
    },
}

/// A piece of a partition: `range.start` is the first offset, `range.end` the one after the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Of which partition.
    pub partition: Partition,
    /// Which offsets.
    pub range: Range<i64>,
}

impl Span {
    /// How many offsets it has; not each need be a record.
    #[must_use]
    pub fn length(&self) -> u64 {
        u64::try_from(self.range.end - self.range.start).unwrap_or(0)
    }
}

/// What a scan brings.
#[derive(Debug)]
pub enum Piece {
    /// Records of one span, by offset; at least one.
    Records {
        /// The partition.
        partition: Partition,
        /// The records, all within the span.
        records: Vec<Record>,
    },
    /// Everything of this span has been brought.
    End(Partition),
}

/// Reads spans in order as a `read_committed` reader, in constant memory.
#[derive(Debug)]
pub struct Scan {
    pieces: mpsc::Receiver<Result<Piece, ScanError>>,
}

impl Scan {
    /// Begins to read all that is on a topic now.
    ///
    /// # Errors
    /// [`AdminError`]
    pub async fn whole(config: &Config, topic: &str) -> Result<Self, AdminError> {
        let whole = |Bounds { partition, low, end }| Span { partition, range: low..end };
        let bounds = bounds(config, &[topic.to_owned()]).await?;
        Self::open(config, bounds.into_iter().map(whole).collect())
    }

    /// Begins to read. The end of no span may lie beyond what [`bounds`] has said.
    ///
    /// # Errors
    /// [`AdminError`] if `[kafka.properties]` cannot be used.
    pub fn open(config: &Config, spans: Vec<Span>) -> Result<Self, AdminError> {
        let attempt = "reading topics".to_owned();
        let consumer =
            consumer(config, true).map_err(|error| AdminError::Refused { attempt, reason: error.to_string() })?;
        let (sender, pieces) = mpsc::channel(PIECES);
        // Ends by itself: after the last span, or when the receiver has gone.
        let config = config.clone();
        drop(tokio::task::spawn_blocking(move || read_all(&config, &consumer, spans, &sender)));
        Ok(Self { pieces })
    }

    /// The next piece; `None` after the end of the last span.
    ///
    /// # Cancellation
    /// Safe.
    ///
    /// # Errors
    /// [`ScanError`]; nothing comes after it.
    pub async fn next(&mut self) -> Result<Option<Piece>, ScanError> {
        self.pieces.recv().await.transpose()
    }
}

fn read_all(
    config: &Config,
    consumer: &BaseConsumer,
    spans: Vec<Span>,
    sender: &mpsc::Sender<Result<Piece, ScanError>>,
) {
    let mut known: Option<Arc<str>> = None;
    let topics: BTreeSet<&str> = spans.iter().map(|span| &*span.partition.topic).collect();
    let topics: Vec<String> = topics.into_iter().map(str::to_owned).collect();
    let names = match logs::names_of(config, &topics, Noting::No) {
        Ok(names) => names,
        Err(error) => {
            if let Some(Span { partition, range }) = spans.into_iter().next() {
                let failed = ScanError::Failed { partition, offset: range.start, reason: error.to_string() };
                // Nobody may listen any more.
                let _ = sender.blocking_send(Err(failed));
            }
            return;
        }
    };
    for span in spans {
        // Assigned a topic that it has not heard of, the client finds out who leads it at its next round of topics, which
        // it makes once a second. Asked for, it knows at once; if it does not answer now the round comes all the same.
        if known.as_ref() != Some(&span.partition.topic) {
            drop(consumer.fetch_metadata(Some(&span.partition.topic), ASK));
            known = Some(Arc::clone(&span.partition.topic));
        }
        let partition = span.partition.clone();
        let log = names.of(&partition.topic).cloned();
        let end = match read(consumer, span, log.as_ref(), sender) {
            Ok(true) => Ok(Piece::End(partition)),
            Ok(false) => return,
            Err(error) => Err(error),
        };
        let failed = end.is_err();
        if sender.blocking_send(end).is_err() || failed {
            return;
        }
    }
}

/// Reads one span; false if the receiver is gone.
fn read(
    consumer: &BaseConsumer,
    Span { partition, range }: Span,
    log: Option<&Arc<str>>,
    sender: &mpsc::Sender<Result<Piece, ScanError>>,
) -> Result<bool, ScanError> {
    if range.is_empty() {
        return Ok(true);
    }
    let mut next = range.start;
    let failed = |offset, reason: String| ScanError::Failed { partition: partition.clone(), offset, reason };
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(next))
        .and_then(|()| consumer.assign(&list))
        .map_err(|error| failed(next, error.to_string()))?;
    let mut moved = Instant::now();
    loop {
        let (mut records, end) = gather(consumer, &range, next);
        if let Some(log) = log {
            for record in &mut records {
                record.log = Some(Arc::clone(log));
            }
        }
        let end = match end {
            End::Reached => true,
            End::Gone => return Err(ScanError::Gone { partition, offset: next }),
            End::Trouble(reason) if moved.elapsed() > PATIENCE => return Err(failed(next, reason.to_string())),
            End::Open | End::Trouble(_) => false,
        };
        if let Some(last) = records.last() {
            (next, moved) = (last.offset + 1, Instant::now());
            if sender.blocking_send(Ok(Piece::Records { partition: partition.clone(), records })).is_err() {
                return Ok(false);
            }
        }
        if end || next >= range.end {
            return Ok(true);
        }
        if moved.elapsed() > PATIENCE {
            return Err(failed(next, format!("no record for {PATIENCE:?}")));
        }
        if sender.is_closed() {
            return Ok(false);
        }
    }
}

/// How far a partition reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Which.
    pub partition: Partition,
    /// The first offset that retention has left.
    pub low: i64,
    /// The offset after everything that had been written when this was asked, and that is decided by now:
    /// committed or rolled back.
    pub end: i64,
}

/// How far the partitions of these topics reach, in order. Waits until every transaction that was open at the time
/// of asking has ended.
///
/// # Errors
/// [`AdminError`]: a topic is missing, no broker answers, or a transaction stays open.
pub async fn bounds(config: &Config, topics: &[String]) -> Result<Vec<Bounds>, AdminError> {
    let (of, topics) = (config.clone(), topics.to_vec());
    blocking(config, "reading end offsets", move || {
        let (all, settled) = (consumer(&of, false)?, consumer(&of, true)?);
        let mut found = Vec::new();
        for partition in partitions(&all, &topics)? {
            let (low, end) = all.fetch_watermarks(&partition.topic, partition.number, ASK)?;
            found.push(Bounds { partition, low, end });
        }
        let since = Instant::now();
        for Bounds { partition, end, .. } in &found {
            while settled.fetch_watermarks(&partition.topic, partition.number, ASK)?.1 < *end {
                if since.elapsed() > SETTLE {
                    return Err(KafkaError::Global(RDKafkaErrorCode::OperationTimedOut));
                }
                // Transactions end within milliseconds; a poll that brings nothing is a pause.
                let _ = settled.poll(Duration::from_millis(10));
            }
        }
        Ok(found)
    })
    .await
}

/// The first offset of each partition whose record is not older than `time`; the end of the partition if there is
/// none.
///
/// # Errors
/// [`AdminError`]
pub async fn at_time(config: &Config, topics: &[String], time: Timestamp) -> Result<Vec<(Partition, i64)>, AdminError> {
    let (of, topics) = (config.clone(), topics.to_vec());
    blocking(config, "looking up offsets by time", move || {
        let consumer = consumer(&of, false)?;
        let mut list = TopicPartitionList::new();
        for partition in partitions(&consumer, &topics)? {
            list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(time.as_millis().max(0)))?;
        }
        let mut found = Vec::new();
        for element in consumer.offsets_for_times(list, ASK)?.elements() {
            let partition = Partition { topic: element.topic().into(), number: element.partition() };
            let offset = match element.offset() {
                Offset::Offset(offset) => offset,
                Offset::Beginning | Offset::End | Offset::Stored | Offset::Invalid | Offset::OffsetTail(_) => {
                    consumer.fetch_watermarks(&partition.topic, partition.number, ASK)?.1
                }
            };
            found.push((partition, offset));
        }
        Ok(found)
    })
    .await
}

/// What `group` has committed for each partition of these topics, with the metadata; nothing if that is about a log that
/// is not there any more.
///
/// # Errors
/// [`AdminError`]
pub async fn committed(
    config: &Config,
    group: &str,
    topics: &[String],
) -> Result<Vec<(Partition, Option<Committed>)>, AdminError> {
    let (mut of, topics) = (config.clone(), topics.to_vec());
    // Asking does not make this client a member: it never subscribes.
    of.properties.insert("group.id".to_owned(), group.to_owned());
    blocking(config, "reading a group's committed offsets", move || {
        // As a read_committed reader it waits for offsets in an open transaction.
        let consumer = consumer(&of, true)?;
        let mut list = TopicPartitionList::new();
        for partition in partitions(&consumer, &topics)? {
            list.add_partition(&partition.topic, partition.number);
        }
        let committed = consumer.committed_offsets(list, ASK)?;
        let ids = topic_ids::ask(consumer.client(), topics.iter().map(String::as_str), ASK)?;
        Ok(committed.elements().iter().map(|element| commit_of(element, &ids)).collect())
    })
    .await
}

/// A partition of a list with what is committed for it.
fn commit_of(
    element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>,
    ids: &TopicIds,
) -> (Partition, Option<Committed>) {
    let partition = Partition { topic: element.topic().into(), number: element.partition() };
    let committed = match element.offset() {
        Offset::Offset(offset) => {
            let committed = Committed { offset, metadata: element.metadata().to_owned() };
            commit_mark::of_this_log(element.topic(), &committed, ids)
        }
        Offset::Beginning | Offset::End | Offset::Stored | Offset::Invalid | Offset::OffsetTail(_) => None,
    };
    (partition, committed)
}

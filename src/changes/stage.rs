//! The loop of the changes stage: gather results, compare them with the last known values, publish, store the new
//! values.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::{Config, Key, Memory};
use crate::{
    kafka::{
        Assignment, Committed, Epoch, Event, Instead, Offsets, Outgoing, Partition, ReadError, Reader, Record,
        TransactError, Writer, intake::IntakeError, outbox::Position,
    },
    message::{
        Change, Observation, Watched, codec,
        envelope::{Envelope, Kind},
        trace,
    },
    runtime::clock::{Clock, Dice, sleep_until_due},
};

/// Kind and version of the commits' metadata: `C1:<next>`, changes of lower offsets are published.
const KIND: &str = "C1:";

/// How many bytes of results a round has, at most: twice as many are held.
const ROUND_BYTES: usize = 32 * 1024 * 1024;

/// How soon a round that failed is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// How long a stop waits for the last round.
const STOP_WITHIN: Duration = Duration::from_secs(10);

/// `ce_source` of what is written here.
pub(crate) const WRITER: &str = "weir/changes";

/// What the stage is made of.
pub struct ChangesParts<R, W, M> {
    /// Reads the results.
    pub reader: R,
    /// Writes the changes.
    pub writer: W,
    /// Remembers the items.
    pub memory: M,
    /// The topic of the changes.
    pub topic: Arc<str>,
    /// How a change ends that the topic does not take.
    pub instead: Instead,
    /// How much at once.
    pub config: Config,
    /// The time of day.
    pub clock: Clock,
    /// Randomness for trace ids.
    pub dice: Dice,
}

/// The stage. Its only task is `run`, so nothing here is shared.
pub struct Changes<R, W, M> {
    parts: ChangesParts<R, W, M>,
    owned: BTreeMap<Partition, Owned>,
    /// When the oldest result that is held came.
    since: Option<Instant>,
    /// Not before, since the last round failed.
    again_at: Option<Instant>,
    /// Partitions that are stopped until the round is over.
    paused: BTreeSet<Partition>,
}

/// A partition that is ours.
struct Owned {
    epoch: Epoch,
    /// Changes of offsets below are on their topic.
    published: i64,
    /// The first offset of this round, and the one after its last.
    range: Option<(i64, i64)>,
    seen: Vec<Seen>,
    /// About how many bytes of memory they take.
    bytes: usize,
}

/// A result without its raw JSON, which is not needed here.
struct Seen {
    offset: i64,
    observation: Observation,
    traceparent: String,
}

/// What a round comes to.
struct Round {
    /// The changes, each with the result that shows it.
    records: Vec<(Outgoing, Position)>,
    offsets: Offsets,
    remembered: HashMap<Key, Watched>,
}

impl<R: Reader, W: Writer, M: Memory> Changes<R, W, M> {
    /// A stage made of these parts.
    #[must_use]
    pub fn new(parts: ChangesParts<R, W, M>) -> Self {
        Self { parts, owned: BTreeMap::new(), since: None, again_at: None, paused: BTreeSet::new() }
    }

    /// Publishes changes until `stop`.
    ///
    /// # Errors
    /// [`IntakeError`]: start again from what is committed.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), IntakeError> {
        loop {
            let wake_at = self.due();
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    // What it does not reach is read again after the next start.
                    return timeout(STOP_WITHIN, self.round()).await.unwrap_or(Ok(()));
                }
                () = sleep_until_due(wake_at) => {
                    // A round that hangs does not hold up a stop; what it does not reach is read again.
                    tokio::select! {
                        ended = self.round() => ended?,
                        () = overdue(&stop) => return Ok(()),
                    }
                }
                event = self.parts.reader.next() => self.take(event?)?,
            }
            self.balance();
        }
    }

    /// How much of a round is held: 1 is a whole round, by their number or by their bytes.
    fn rounds(&self) -> usize {
        let rows: usize = self.owned.values().map(|owned| owned.seen.len()).sum();
        let bytes: usize = self.owned.values().map(|owned| owned.bytes).sum();
        (rows / self.parts.config.rows.max(1)).max(bytes / ROUND_BYTES)
    }

    /// When the next round begins.
    fn due(&self) -> Option<Instant> {
        let since = self.since?;
        let due = if self.rounds() >= 1 { since } else { since + self.parts.config.age };
        Some(self.again_at.map_or(due, |again| again.max(due)))
    }

    fn take(&mut self, event: Event) -> Result<(), IntakeError> {
        match event {
            Event::Assigned(assignments) => {
                assignments.into_iter().try_for_each(|assignment| self.assigned(assignment))?;
            }
            Event::Records { partition, epoch, records } => self.records(&partition, epoch, &records),
            Event::Gone { partition, range, .. } => error!(
                %partition, first = range.start, last = range.end - 1,
                "results were deleted by the topic's retention before they were compared: their changes are unknown. \
                 Raise the topic's retention"
            ),
            // No round is under way while an event is handled: there is nothing to finish.
            Event::Revoked(partitions, _) | Event::Lost(partitions) => {
                self.paused.retain(|partition| !partitions.contains(partition));
                self.owned.retain(|partition, _| !partitions.contains(partition));
            }
        }
        Ok(())
    }

    fn assigned(&mut self, assignment: Assignment) -> Result<(), ReadError> {
        let Assignment { partition, epoch, committed, .. } = assignment;
        let published = committed.as_ref().map_or(Ok(0), published_by);
        let published = published.map_err(|reason| ReadError::Ledger { partition: partition.clone(), reason })?;
        // A new assignment flows, whatever was asked for before.
        self.paused.remove(&partition);
        self.owned.insert(partition, Owned { epoch, published, range: None, seen: Vec::new(), bytes: 0 });
        Ok(())
    }

    fn records(&mut self, partition: &Partition, epoch: Epoch, records: &[Record]) {
        let Some(owned) = self.owned.get_mut(partition).filter(|owned| owned.epoch == epoch) else { return };
        self.since.get_or_insert_with(Instant::now);
        for record in records {
            let first = owned.range.map_or(record.offset, |(first, _)| first);
            owned.range = Some((first, record.offset + 1));
            let raw = record.raw(partition);
            match codec::read_observation(&raw) {
                Ok(observation) => {
                    let raw_bytes = observation.raw.as_ref().map_or(0, |raw| raw.get().len());
                    owned.bytes += size_of::<Seen>() + record.footprint().saturating_sub(raw_bytes);
                    owned.seen.push(Seen {
                        offset: record.offset,
                        observation: Observation { raw: None, ..observation },
                        traceparent: trace::continued(raw.traceparent(), &self.parts.dice),
                    });
                }
                // The sink makes its dead letter.
                Err(why) => debug!(%partition, offset = record.offset, %why, "ignored a record that is no result"),
            }
        }
    }

    /// Compares, publishes and remembers what is held. A failure that waiting can mend leaves it as it was.
    async fn round(&mut self) -> Result<(), IntakeError> {
        if self.owned.values().all(|owned| owned.range.is_none()) {
            return Ok(());
        }
        self.again_at = Some(Instant::now() + AGAIN);
        let items: Vec<Key> = self.keys();
        let mut known = HashMap::new();
        if !items.is_empty() {
            known = match self.parts.memory.recall(&items).await {
                Ok(known) => known,
                Err(error) => {
                    warn!(%error, items = items.len(), "cannot look up the last known values of the items; changes wait, trying again");
                    return Ok(());
                }
            };
        }
        let round = self.compare(known);
        debug!(items = items.len(), changes = round.records.len(), partitions = round.offsets.len(), "a round");
        match self.publish(round.records, round.offsets).await {
            Ok(()) => {}
            Err(TransactError::Aborted(reason)) => {
                debug!(reason, "transaction aborted; sending the changes again");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
        for owned in self.owned.values_mut() {
            owned.published = owned.range.map_or(owned.published, |(_, next)| owned.published.max(next));
        }
        if let Err(error) = self.parts.memory.remember(&round.remembered).await {
            warn!(%error, items = round.remembered.len(), "changes are published, but their values are not stored yet; trying again");
            return Ok(());
        }
        self.end_round().await;
        Ok(())
    }

    /// Writes the changes; one that is too large for its topic ends as a dead letter, and the others are written.
    async fn publish(&self, changes: Vec<(Outgoing, Position)>, offsets: Offsets) -> Result<(), TransactError> {
        let (mut records, origins): (Vec<Outgoing>, Vec<Position>) = changes.into_iter().unzip();
        loop {
            let membership = self.parts.reader.membership();
            match self.parts.writer.transact(records.clone(), membership, offsets.clone()).await {
                Err(TransactError::TooLarge(all)) => {
                    for why in &all {
                        error!(record = %why, "a change is too large for Kafka; writing a dead letter instead");
                    }
                    self.parts.instead.replace(&mut records, &origins, &all, self.parts.clock.now())?;
                }
                ended => return ended,
            }
        }
    }

    fn keys(&self) -> Vec<Key> {
        let seen = self.owned.values().flat_map(|owned| &owned.seen);
        let mut keys: Vec<Key> =
            seen.map(|seen| (seen.observation.source.clone(), seen.observation.item.clone())).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    fn compare(&self, mut known: HashMap<Key, Watched>) -> Round {
        let mut round = Round { records: Vec::new(), offsets: Vec::new(), remembered: HashMap::new() };
        for (partition, owned) in &self.owned {
            let Some((first, next)) = owned.range else { continue };
            for Seen { offset, observation, traceparent } in &owned.seen {
                let key = (observation.source.clone(), observation.item.clone());
                let Some((changes, now)) = Watched::compare(known.get(&key), observation) else { continue };
                known.insert(key.clone(), now.clone());
                round.remembered.insert(key, now);
                if *offset >= owned.published {
                    let origin = Position { partition: partition.clone(), epoch: owned.epoch, offset: *offset };
                    let changes = changes.iter().map(|change| self.outgoing(change, traceparent));
                    round.records.extend(changes.map(|change| (change, origin.clone())));
                }
            }
            let metadata = format!("{KIND}{}", next.max(owned.published));
            round.offsets.push((partition.clone(), owned.epoch, Committed { offset: first, metadata }));
        }
        round
    }

    fn outgoing(&self, change: &Change, traceparent: &str) -> Outgoing {
        let id = format!("{}#{}", change.request_id, change.field.as_str());
        let envelope = Envelope {
            kind: Kind::Change,
            id: &id,
            writer: WRITER,
            time: change.new_at,
            traceparent: Some(traceparent),
        };
        let codec::Encoded { headers, value } = codec::encode(&envelope, change);
        let key = Some(Bytes::copy_from_slice(change.item.as_str().as_bytes()));
        Outgoing { topic: Arc::clone(&self.parts.topic), key, value, headers }
    }

    /// All is remembered: what is committed moves behind the round.
    async fn end_round(&mut self) {
        self.since = None;
        self.again_at = None;
        let mut offsets = Offsets::new();
        for (partition, owned) in &mut self.owned {
            owned.seen.clear();
            owned.bytes = 0;
            if let Some((_, next)) = owned.range.take() {
                let metadata = format!("{KIND}{}", owned.published);
                offsets.push((partition.clone(), owned.epoch, Committed { offset: next, metadata }));
            }
        }
        if let Err(error) = self.parts.reader.commit(offsets).await {
            debug!(%error, "the round would be read and remembered once more");
        }
    }

    /// Stops the flow while more than two rounds are held.
    fn balance(&mut self) {
        if self.rounds() >= 2 {
            // Also those that have come since.
            for partition in self.owned.keys().filter(|partition| self.paused.insert((*partition).clone())) {
                self.parts.reader.pause(partition);
            }
        } else {
            for partition in std::mem::take(&mut self.paused) {
                self.parts.reader.resume(&partition);
            }
        }
    }
}

/// Ends when a stop has been asked for, and nothing may wait for it any longer.
async fn overdue(stop: &CancellationToken) {
    stop.cancelled().await;
    sleep(STOP_WITHIN).await;
}

/// How far changes were published, by the metadata of a commit.
fn published_by(committed: &Committed) -> Result<i64, String> {
    let Some(text) = committed.metadata.strip_prefix(KIND) else {
        if committed.metadata.is_empty() {
            return Ok(committed.offset);
        }
        let found: String = committed.metadata.chars().take(8).collect();
        return Err(format!("the commit metadata begins with {found:?}, this version of weir reads {KIND:?}"));
    };
    text.parse().map_err(|_| format!("the commit metadata {text:?} is no offset"))
}

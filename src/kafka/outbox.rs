//! Outcomes waiting for a transaction, together with the ledgers that the same transaction commits. Pure.

use std::collections::{HashMap, HashSet};

use tokio::time::Instant;

use super::{
    Assignment, Committed, Epoch, Offsets, Outgoing, Partition,
    kept::{Answer, Kept, Print},
    ledger::{Admit, Ledger, LedgerError},
};

/// Where a record stands, and under which assignment it was read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Position {
    /// The partition.
    pub partition: Partition,
    /// The assignment.
    pub epoch: Epoch,
    /// The offset.
    pub offset: i64,
}

/// What is to be written for a record: its end, or something before that.
#[derive(Debug)]
struct Outcome {
    position: Position,
    /// Of its request; missing if that was not admitted, or if something else was published for it: then it is not kept.
    print: Option<Print>,
    answer: Answer,
    /// What it is called if the record is not done with it, see [`Outbox::publish`].
    published: Option<PublishId>,
}

/// Names what was handed to [`Outbox::publish`]. Only good for the outbox that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublishId(u64);

impl Outcome {
    fn size(&self) -> usize {
        self.answer.size()
    }
}

/// Calls that would have to be made again if the process were killed now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Risk {
    /// How many have ended, and are not committed.
    pub calls: usize,
    /// When the first of them ended.
    pub since: Option<Instant>,
}

impl Risk {
    fn of(outcomes: &[Outcome]) -> Self {
        let mut risk = Self::default();
        for outcome in outcomes {
            risk.add(&outcome.answer);
        }
        risk
    }

    fn add(&mut self, answer: &Answer) {
        if answer.calls > 0 {
            self.calls += usize::try_from(answer.calls).unwrap_or(usize::MAX);
            self.since = Some(self.since.map_or(answer.since, |since| since.min(answer.since)));
        }
    }

    /// Both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let since = self.since.into_iter().chain(other.since).min();
        Self { calls: self.calls + other.calls, since }
    }
}

/// One transaction's worth of outcomes, and the offsets to commit with them.
#[derive(Debug)]
pub struct Batch {
    /// What to write.
    pub records: Vec<Outgoing>,
    /// How far that brings the group.
    pub offsets: Offsets,
}

/// One partition that is ours.
#[derive(Debug)]
struct Owned {
    ledger: Ledger,
    /// Records admitted, and not yet completed or given up, by offset; without its print one for which something was
    /// published.
    open: HashMap<i64, Option<Print>>,
}

/// The ledgers of all partitions that are ours, and the outcomes that wait to be committed with them.
///
/// At most one transaction is under way: [`Self::begin`] hands out a batch, [`Self::committed`] or
/// [`Self::rolled_back`] ends it. Outcomes stay in memory until the broker has them.
#[derive(Debug, Default)]
pub struct Outbox {
    owned: HashMap<Partition, Owned>,
    waiting: Vec<Outcome>,
    waiting_bytes: usize,
    waiting_risk: Risk,
    /// The outcomes of the transaction under way.
    under_way: Option<(Vec<Outcome>, Offsets)>,
    under_way_bytes: usize,
    under_way_risk: Risk,
    /// Records of assignments that are over, and that may still come to something.
    left: HashMap<(Partition, Epoch), HashMap<i64, Option<Print>>>,
    /// Where outcomes go whose assignment is over, if anywhere.
    kept: Kept,
    /// How often something was published that ends no record, and up to which of these all are committed or dropped:
    /// they travel in their order.
    published: u64,
    published_through: u64,
}

impl Outbox {
    /// The most outcomes that travel in one transaction.
    const BATCH_OUTCOMES: usize = 10_000;

    /// The most bytes that travel in one transaction, unless one outcome has more: they must all be delivered
    /// within the records' time-out, or the same transaction would be tried for ever.
    const BATCH_BYTES: usize = 16 * 1024 * 1024;

    /// An outbox whose outcomes outlive their assignment in `kept`.
    #[must_use]
    pub fn keeping(kept: Kept) -> Self {
        Self { kept, ..Self::default() }
    }

    /// A partition was assigned.
    ///
    /// # Errors
    /// [`LedgerError`] if its commit cannot be understood.
    pub fn assign(&mut self, assignment: &Assignment) -> Result<(), LedgerError> {
        let ledger = Ledger::new(assignment.epoch, assignment.committed.as_ref())?;
        self.owned.insert(assignment.partition.clone(), Owned { ledger, open: HashMap::new() });
        Ok(())
    }

    /// A partition is not ours any more: its ledger is dropped, and so are all outcomes that are not committed yet,
    /// unless it comes back (see [`Kept`]). A new owner makes them again.
    pub fn forget(&mut self, partition: &Partition) {
        if let Some(Owned { ledger, open }) = self.owned.remove(partition)
            && !open.is_empty()
            && self.kept.has_room()
        {
            self.left.insert((partition.clone(), ledger.epoch()), open);
        }
        let waiting = std::mem::take(&mut self.waiting);
        let (of_it, others) = waiting.into_iter().partition(|outcome| outcome.position.partition == *partition);
        self.set_waiting(others);
        self.keep(of_it);
    }

    /// The stage ends: what is not committed is kept, also that of the transaction under way, whose fate the group's
    /// commit will tell.
    pub fn keep_all(&mut self) {
        let under_way = self.under_way.take().map(|(outcomes, _)| outcomes);
        let waiting = std::mem::take(&mut self.waiting);
        (self.waiting_bytes, self.under_way_bytes) = (0, 0);
        (self.waiting_risk, self.under_way_risk) = (Risk::default(), Risk::default());
        self.keep(under_way.into_iter().flatten().chain(waiting).collect());
    }

    fn keep(&self, outcomes: Vec<Outcome>) {
        for Outcome { position, print, answer, published } in outcomes {
            match print {
                // Whoever works on the record next publishes it anew.
                None if published.is_some() => {}
                Some(print) => self.kept.put(&position.partition, position.offset, print, answer),
                None => self.kept.lose(answer.calls),
            }
        }
    }

    fn set_waiting(&mut self, waiting: Vec<Outcome>) {
        self.waiting_bytes = waiting.iter().map(Outcome::size).sum();
        self.waiting_risk = Risk::of(&waiting);
        self.waiting = waiting;
    }

    /// A record has been read; says whether it is to be worked on.
    pub fn admit(&mut self, position: &Position, print: Print) -> Admit {
        let Some(owned) = self.current(position) else { return Admit::Known };
        let admit = owned.ledger.admit(position.offset);
        match admit {
            Admit::New => drop(owned.open.insert(position.offset, Some(print))),
            Admit::Known => self.kept.forget(&position.partition, position.offset),
        }
        admit
    }

    /// What an admitted record came to before its partition left, if that is still here: complete it with that.
    #[must_use]
    pub fn kept(&self, position: &Position, now: Instant) -> Option<Answer> {
        let owned = self.owned.get(&position.partition).filter(|owned| owned.ledger.epoch() == position.epoch)?;
        let print = (*owned.open.get(&position.offset)?)?;
        self.kept.take(&position.partition, position.offset, print, now)
    }

    /// Records before `until` have been deleted by retention.
    pub fn gone(&mut self, partition: &Partition, epoch: Epoch, until: i64) {
        let position = Position { partition: partition.clone(), epoch, offset: until };
        if let Some(owned) = self.current(&position) {
            owned.ledger.gone(until);
        }
    }

    /// Whether work on a record may begin: false if its assignment is over, or the window is full.
    #[must_use]
    pub fn may_start(&self, position: &Position) -> bool {
        self.owned
            .get(&position.partition)
            .is_some_and(|owned| owned.ledger.epoch() == position.epoch && owned.ledger.may_start(position.offset))
    }

    /// Whether the assignment under which a record was read goes on.
    #[must_use]
    pub fn is_current(&self, position: &Position) -> bool {
        self.owned.get(&position.partition).is_some_and(|owned| owned.ledger.epoch() == position.epoch)
    }

    /// A record has its outcome. If its assignment is over that is kept, and written only if the record comes back.
    pub fn complete(&mut self, position: Position, answer: Answer) {
        if let Some(owned) = self.current(&position) {
            let print = owned.open.remove(&position.offset).flatten();
            self.push(Outcome { position, print, answer, published: None });
        } else {
            let print = self.leave(&position);
            self.keep(vec![Outcome { position, print, answer, published: None }]);
        }
    }

    /// Writes `records` on behalf of a record that is still worked on, and stays so: an intent, say, that has to be on
    /// the log before a vendor is asked for something that it answers later. `None`: the record is not worked on here,
    /// or not any more, and nothing is written.
    ///
    /// They travel in a transaction that the group fences as any other, and that does not count the record as done;
    /// [`Self::is_published`] says when it is committed. One that is rolled back is tried again.
    ///
    /// # Ordering
    /// In the order of the calls, and no later than the end of the record: who sees that sees these too.
    ///
    /// # How often they are seen
    /// Once for each call. If the partition or the role leaves first, what is not committed is dropped, and so is the
    /// record's end: it is not [kept](Kept), since that would come without these. Whoever works on the record next
    /// publishes anew, so over several lives a reader may see the same more than once and tells it by what it says, such
    /// as a request's id. One that is too large for its topic is replaced as an end would be, by a dead letter: they are
    /// to be small.
    pub fn publish(&mut self, position: &Position, records: Vec<Outgoing>) -> Option<PublishId> {
        *self.current(position)?.open.get_mut(&position.offset)? = None;
        self.published += 1;
        let (id, answer) = (PublishId(self.published), Answer { records, calls: 0, since: Instant::now() });
        self.push(Outcome { position: position.clone(), print: None, answer, published: Some(id) });
        Some(id)
    }

    /// Whether what was published under this name is committed. It may be said of what was dropped with its partition,
    /// too: for a record that is not [current](Self::is_current) it means nothing.
    #[must_use]
    pub fn is_published(&self, id: PublishId) -> bool {
        id.0 <= self.published_through
    }

    fn push(&mut self, outcome: Outcome) {
        self.waiting_bytes += outcome.size();
        self.waiting_risk.add(&outcome.answer);
        self.waiting.push(outcome);
    }

    /// Gives up an admitted record: the partition's next owner reads it again.
    pub fn give_up(&mut self, position: &Position) {
        match self.current(position) {
            Some(owned) => drop(owned.open.remove(&position.offset)),
            None => drop(self.leave(position)),
        }
    }

    /// The same for one that has come to something already.
    pub fn give_up_with(&mut self, position: Position, answer: Answer) {
        let print = match self.current(&position) {
            Some(owned) => owned.open.remove(&position.offset).flatten(),
            None => self.leave(&position),
        };
        self.keep(vec![Outcome { position, print, answer, published: None }]);
    }

    /// Takes a record out of those of an assignment that is over.
    fn leave(&mut self, position: &Position) -> Option<Print> {
        let key = (position.partition.clone(), position.epoch);
        let open = self.left.get_mut(&key)?;
        let print = open.remove(&position.offset).flatten();
        if open.is_empty() {
            self.left.remove(&key);
        }
        print
    }

    /// Calls whose outcomes are not committed yet.
    #[must_use]
    pub fn risk(&self) -> Risk {
        self.waiting_risk.and(self.under_way_risk)
    }

    /// Whether all that was admitted of this partition is completed (or given up) and committed.
    #[must_use]
    pub fn is_settled(&self, partition: &Partition) -> bool {
        let of_it = |outcome: &Outcome| outcome.position.partition == *partition;
        let under_way =
            self.under_way.as_ref().is_some_and(|(_, offsets)| offsets.iter().any(|(p, _, _)| p == partition));
        self.owned.get(partition).is_none_or(|owned| owned.open.is_empty())
            && !under_way
            && !self.waiting.iter().any(of_it)
    }

    /// Bytes of outcomes that are not committed yet.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.waiting_bytes + self.under_way_bytes
    }

    /// Whether there are outcomes that no transaction carries yet.
    #[must_use]
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The next transaction, unless one is under way or there is nothing to commit.
    pub fn begin(&mut self) -> Option<Batch> {
        if self.under_way.is_some() {
            return None;
        }
        let rest = self.waiting.split_off(self.next_batch());
        let outcomes = std::mem::replace(&mut self.waiting, rest);
        self.under_way_bytes = self.waiting_bytes;
        self.waiting_bytes = self.waiting.iter().map(Outcome::size).sum();
        self.under_way_bytes -= self.waiting_bytes;
        (self.under_way_risk, self.waiting_risk) = (Risk::of(&outcomes), Risk::of(&self.waiting));
        for outcome in outcomes.iter().filter(|outcome| outcome.published.is_none()) {
            if let Some(owned) = self.owned.get_mut(&outcome.position.partition) {
                owned.ledger.complete(outcome.position.offset);
            }
        }
        let offsets = self.offsets_of(&outcomes);
        if offsets.is_empty() {
            (self.under_way_bytes, self.under_way_risk) = (0, Risk::default());
            return None;
        }
        let records = outcomes.iter().flat_map(|outcome| outcome.answer.records.iter().cloned()).collect();
        self.under_way = Some((outcomes, offsets.clone()));
        Some(Batch { records, offsets })
    }

    /// How many of the waiting outcomes travel next.
    fn next_batch(&self) -> usize {
        let mut bytes = 0;
        let fits = |outcome: &&Outcome| {
            bytes += outcome.size();
            bytes <= Self::BATCH_BYTES
        };
        let count = self.waiting.iter().take(Self::BATCH_OUTCOMES).take_while(fits).count();
        count.max(1).min(self.waiting.len())
    }

    /// What has to be committed with these outcomes.
    ///
    /// Outcomes never travel without their offsets, since a transaction without offsets is not fenced by the
    /// group: not even if they change nothing (the record has been deleted by retention meanwhile). A partition
    /// that only passed over gaps is not worth a transaction.
    fn offsets_of(&self, outcomes: &[Outcome]) -> Offsets {
        let touched: HashSet<&Partition> = outcomes.iter().map(|outcome| &outcome.position.partition).collect();
        let state = |partition: &Partition| -> Option<(Partition, Epoch, Committed)> {
            let owned = self.owned.get(partition)?;
            Some((partition.clone(), owned.ledger.epoch(), owned.ledger.snapshot()?))
        };
        touched.into_iter().filter_map(state).collect()
    }

    /// The transaction has been committed.
    pub fn committed(&mut self) {
        let (outcomes, _) = self.under_way.take().unwrap_or_default();
        let published = outcomes.iter().filter_map(|outcome| outcome.published).max();
        self.published_through = published.map_or(self.published_through, |PublishId(number)| number);
        (self.under_way_bytes, self.under_way_risk) = (0, Risk::default());
    }

    /// Puts another record in the place of the one of this number in the transaction under way, to be sent with the next.
    ///
    /// # Errors
    /// What `make` says.
    pub fn replace<E>(
        &mut self,
        index: usize,
        make: impl FnOnce(&Outgoing, &Position) -> Result<Outgoing, E>,
    ) -> Result<(), E> {
        let outcomes = self.under_way.iter_mut().flat_map(|(outcomes, _)| outcomes);
        let mut records = outcomes.flat_map(|Outcome { position, answer, .. }| {
            let position = &*position;
            answer.records.iter_mut().map(move |record| (record, position))
        });
        if let Some((record, position)) = records.nth(index) {
            *record = make(record, position)?;
        }
        Ok(())
    }

    /// The transaction has been rolled back: its outcomes travel again, but for partitions that have left.
    pub fn rolled_back(&mut self) {
        let Some((outcomes, _)) = self.under_way.take() else { return };
        (self.under_way_bytes, self.under_way_risk) = (0, Risk::default());
        let newer = std::mem::take(&mut self.waiting);
        let still_ours = |outcome: &Outcome| {
            let owned = self.owned.get(&outcome.position.partition);
            owned.is_some_and(|owned| owned.ledger.epoch() == outcome.position.epoch)
        };
        let (ours, gone): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(still_ours);
        self.set_waiting(ours.into_iter().chain(newer).collect());
        self.keep(gone);
    }

    fn current(&mut self, position: &Position) -> Option<&mut Owned> {
        self.owned.get_mut(&position.partition).filter(|owned| owned.ledger.epoch() == position.epoch)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn partition(number: i32) -> Partition {
        Partition { topic: "requests".into(), number }
    }

    fn outcome(at: &Position) -> Answer {
        let value = Bytes::from(format!("{}@{}", at.partition.number, at.offset));
        answer(value)
    }

    fn answer(value: Bytes) -> Answer {
        let records = vec![Outgoing { topic: "results".into(), key: None, value, headers: vec![] }];
        Answer { records, calls: 1, since: Instant::now() }
    }

    /// Of the record at an offset of the test's topic.
    fn print(offset: i64) -> Print {
        let time = crate::runtime::clock::Timestamp::from_millis(offset);
        Print::of(&crate::kafka::Record { offset, time, key: None, value: None, headers: vec![], log: None })
    }

    /// The broker's side: records per partition, what is committed, and the outcomes that readers see.
    #[derive(Default)]
    struct Broker {
        committed: HashMap<Partition, Committed>,
        visible: HashMap<Bytes, u32>,
        /// Outcomes whose record had published an intent in the same life, which nobody has seen.
        without_intent: Vec<Bytes>,
        intents: HashMap<Bytes, u32>,
    }

    /// One process that works on two partitions, with an in-flight transaction whose end it may not live to see.
    struct Model {
        broker: Broker,
        outbox: Outbox,
        epoch: u64,
        read: HashMap<Partition, i64>,
        open: Vec<Position>,
        batch: Option<Batch>,
        kept: Kept,
        /// Records that a call has answered.
        answered: HashSet<(Partition, i64)>,
        /// How many calls began for a record that was answered before.
        again: u32,
        /// Whether anything happened that loses what is kept.
        crashed: bool,
        /// What was published without an end, by its name in the outbox of now.
        published: HashMap<PublishId, (Position, Bytes)>,
        /// How often for each record.
        intents: HashMap<Bytes, u32>,
        /// Records of the assignments of now that an intent was published for.
        with_intent: HashMap<Bytes, Partition>,
    }

    const RECORDS: i64 = 60;

    #[derive(Clone, Debug)]
    enum Step {
        Read(i32, i64),
        Complete(prop::sample::Index),
        /// An intent for a record that is still open.
        Publish(prop::sample::Index),
        Begin,
        Commit,
        RollBack,
        /// The broker committed, but the process died before it heard of it.
        CommitAndCrash,
        Crash,
        /// The role fails and begins anew in the same process; the broker may have committed what was under way.
        BeginAnew(bool),
        /// The partition leaves and comes back; a transaction under way may still commit before that, or not.
        Rebalance(i32),
    }

    impl Model {
        fn new() -> Self {
            let mut model = Self {
                broker: Broker::default(),
                outbox: Outbox::default(),
                epoch: 0,
                read: HashMap::new(),
                open: vec![],
                batch: None,
                kept: Kept::default(),
                answered: HashSet::new(),
                again: 0,
                crashed: false,
                published: HashMap::new(),
                intents: HashMap::new(),
                with_intent: HashMap::new(),
            };
            model.restart();
            model
        }

        /// Another process: what is kept is gone.
        fn restart(&mut self) {
            self.kept = Kept::new(1_000_000);
            self.begin();
        }

        fn begin(&mut self) {
            self.outbox = Outbox::keeping(self.kept.clone());
            self.batch = None;
            self.open.clear();
            self.published.clear();
            self.with_intent.clear();
            (0..2).for_each(|number| self.assign(&partition(number)));
        }

        fn assign(&mut self, partition: &Partition) {
            self.epoch += 1;
            let committed = self.broker.committed.get(partition).cloned();
            self.read.insert(partition.clone(), committed.as_ref().map_or(0, |committed| committed.offset));
            let assignment =
                Assignment { partition: partition.clone(), epoch: Epoch(self.epoch), committed, log: None };
            self.outbox.assign(&assignment).unwrap();
        }

        fn read(&mut self, partition: &Partition, count: i64) {
            let epoch = self.outbox.owned[partition].ledger.epoch();
            for _ in 0..count {
                let next = self.read.get_mut(partition).unwrap();
                if *next == RECORDS {
                    return;
                }
                let position = Position { partition: partition.clone(), epoch, offset: *next };
                *next += 1;
                if self.outbox.admit(&position, print(position.offset)) == Admit::New {
                    if let Some(answer) = self.outbox.kept(&position, Instant::now()) {
                        self.outbox.complete(position, answer);
                    } else {
                        self.again += u32::from(self.answered.contains(&(partition.clone(), position.offset)));
                        self.open.push(position);
                    }
                }
            }
        }

        fn apply(&mut self, batch: Batch) {
            let (intents, outcomes): (Vec<_>, Vec<_>) =
                batch.records.into_iter().partition(|record| *record.topic == *"intents");
            for intent in intents {
                *self.broker.intents.entry(intent.value).or_default() += 1;
            }
            for record in outcomes {
                if self.with_intent.contains_key(&record.value) && !self.broker.intents.contains_key(&record.value) {
                    self.broker.without_intent.push(record.value.clone());
                }
                *self.broker.visible.entry(record.value).or_default() += 1;
            }
            for (partition, _, committed) in batch.offsets {
                self.broker.committed.insert(partition, committed);
            }
        }

        fn step(&mut self, step: &Step) {
            match step {
                Step::Read(number, count) => self.read(&partition(*number), *count),
                Step::Complete(index) if !self.open.is_empty() => {
                    let position = self.open.swap_remove(index.index(self.open.len()));
                    let records = outcome(&position);
                    // With an intent it is not kept.
                    if !self.published.values().any(|(of, _)| *of == position) {
                        self.answered.insert((position.partition.clone(), position.offset));
                    }
                    self.outbox.complete(position, records);
                }
                Step::Publish(index) if !self.open.is_empty() => {
                    let position = self.open[index.index(self.open.len())].clone();
                    let value = outcome(&position).records[0].value.clone();
                    let intent = Outgoing { topic: "intents".into(), key: None, value: value.clone(), headers: vec![] };
                    // Some are of an assignment that is over.
                    if let Some(id) = self.outbox.publish(&position, vec![intent]) {
                        *self.intents.entry(value.clone()).or_default() += 1;
                        self.with_intent.insert(value.clone(), position.partition.clone());
                        self.published.insert(id, (position, value));
                    } else {
                        assert!(!self.outbox.is_current(&position), "the record is open");
                    }
                }
                Step::Complete(_) | Step::Publish(_) => {}
                Step::Begin => self.batch = self.outbox.begin().or(self.batch.take()),
                Step::Commit => {
                    if let Some(batch) = self.batch.take() {
                        self.apply(batch);
                        self.outbox.committed();
                    }
                }
                Step::RollBack => {
                    if self.batch.take().is_some() {
                        self.outbox.rolled_back();
                    }
                }
                Step::CommitAndCrash => {
                    self.crashed = true;
                    if let Some(batch) = self.batch.take() {
                        self.apply(batch);
                    }
                    self.restart();
                }
                Step::Crash => {
                    self.crashed = true;
                    self.restart();
                }
                Step::BeginAnew(commits) => {
                    if let Some(batch) = self.batch.take().filter(|_| *commits) {
                        self.apply(batch);
                    }
                    self.outbox.keep_all();
                    self.begin();
                }
                Step::Rebalance(number) => {
                    // The reader lets a partition go only when the transaction that holds it has ended.
                    self.step(&Step::RollBack);
                    self.outbox.forget(&partition(*number));
                    self.with_intent.retain(|_, of| *of != partition(*number));
                    self.assign(&partition(*number));
                }
            }
        }

        /// What is said to be committed of what was published, and is not.
        fn falsely_published(&self) -> Option<&Bytes> {
            let is_false = |(id, (position, value)): &(&PublishId, &(Position, Bytes))| {
                self.outbox.is_published(**id)
                    && self.outbox.is_current(position)
                    && !self.broker.intents.contains_key(value)
            };
            self.published.iter().find(is_false).map(|(_, (_, value))| value)
        }

        fn finish(&mut self) {
            self.restart();
            (0..2).for_each(|number| self.read(&partition(number), RECORDS));
            for position in std::mem::take(&mut self.open) {
                let records = outcome(&position);
                self.outbox.complete(position, records);
            }
            self.step(&Step::Begin);
            self.step(&Step::Commit);
        }
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..2_i32, 0..20_i64).prop_map(|(number, count)| Step::Read(number, count)),
            30 => any::<prop::sample::Index>().prop_map(Step::Complete),
            5 => any::<prop::sample::Index>().prop_map(Step::Publish),
            4 => Just(Step::Begin),
            4 => Just(Step::Commit),
            1 => Just(Step::RollBack),
            1 => Just(Step::CommitAndCrash),
            1 => Just(Step::Crash),
            1 => any::<bool>().prop_map(Step::BeginAnew),
            1 => (0..2_i32).prop_map(Step::Rebalance),
        ]
    }

    proptest! {
        #[test]
        fn whatever_fails_each_record_has_exactly_one_visible_outcome(steps in prop::collection::vec(step(), 0..500)) {
            let mut model = Model::new();
            for step in &steps {
                model.step(step);
                prop_assert_eq!(model.falsely_published(), None, "it is not on the log");
            }
            // One whose partition left and came back while its call was under way is called for twice at once.
            prop_assert!(model.crashed || model.again == 0, "called for again though the answer was there");
            model.finish();
            let doubled: Vec<_> = model.broker.visible.iter().filter(|(_, times)| **times != 1).collect();
            prop_assert!(doubled.is_empty(), "doubled: {doubled:?}");
            prop_assert_eq!(model.broker.visible.len(), 2 * usize::try_from(RECORDS).unwrap());
            prop_assert_eq!(&model.broker.without_intent, &Vec::<Bytes>::new(), "an end came before its intent");
            for (intent, times) in &model.broker.intents {
                prop_assert!(*times <= model.intents[intent], "{:?} was published once and came {} times", intent, times);
            }
        }
    }

    #[test]
    fn what_is_published_before_the_end_is_committed_while_the_record_stays_open() {
        let mut outbox = Outbox::keeping(Kept::new(1_000_000));
        let assign = |outbox: &mut Outbox, epoch| {
            let assignment = Assignment { partition: partition(0), epoch: Epoch(epoch), committed: None, log: None };
            outbox.assign(&assignment).unwrap();
        };
        let position = |epoch| Position { partition: partition(0), epoch: Epoch(epoch), offset: 0 };
        let intent = || vec![Outgoing { topic: "intents".into(), key: None, value: "i".into(), headers: vec![] }];
        assign(&mut outbox, 1);
        assert_eq!(outbox.publish(&position(1), intent()), None, "it was not read");
        outbox.admit(&position(1), print(0));
        let id = outbox.publish(&position(1), intent()).unwrap();
        assert!(outbox.has_waiting() && outbox.risk() == Risk::default() && !outbox.is_published(id));
        let batch = outbox.begin().unwrap();
        assert_eq!((batch.records, batch.offsets[0].2.offset), (intent(), 0), "it is fenced, and nothing is done");
        outbox.rolled_back();
        assert!(!outbox.is_published(id) && outbox.begin().is_some());
        outbox.committed();
        assert!(outbox.is_published(id) && !outbox.is_settled(&partition(0)), "its record is still worked on");

        // The next one is not committed when the partition leaves; the record is worked on from its beginning then.
        let next = outbox.publish(&position(1), intent()).unwrap();
        outbox.complete(position(1), outcome(&position(1)));
        assert!(!outbox.is_published(next));
        outbox.forget(&partition(0));
        assign(&mut outbox, 2);
        assert_eq!(outbox.admit(&position(2), print(0)), Admit::New);
        assert_eq!(outbox.kept(&position(2), Instant::now()), None, "its end would come without the intent");
        assert_eq!(outbox.publish(&position(1), intent()), None, "that assignment is over");
        outbox.complete(position(2), outcome(&position(2)));
        assert_eq!(outbox.begin().map(|batch| batch.records.len()), Some(1));
    }

    #[test]
    fn outcomes_of_a_partition_that_left_are_dropped_even_if_it_came_back() {
        let mut outbox = Outbox::default();
        let assign = |outbox: &mut Outbox, epoch| {
            outbox
                .assign(&Assignment { partition: partition(0), epoch: Epoch(epoch), committed: None, log: None })
                .unwrap();
        };
        assign(&mut outbox, 1);
        let position = Position { partition: partition(0), epoch: Epoch(1), offset: 0 };
        outbox.admit(&position, print(position.offset));
        outbox.forget(&partition(0));
        assign(&mut outbox, 2);
        outbox.complete(position.clone(), outcome(&position));
        assert!(outbox.begin().is_none());
        assert!(!outbox.may_start(&position));
    }

    #[test]
    fn a_call_that_ends_after_its_partition_has_left_is_not_made_again_when_that_comes_back() {
        let kept = Kept::new(1_000_000);
        let mut outbox = Outbox::keeping(kept.clone());
        let position = |epoch, offset| Position { partition: partition(0), epoch: Epoch(epoch), offset };
        let assign = |outbox: &mut Outbox, epoch| {
            let assignment = Assignment { partition: partition(0), epoch: Epoch(epoch), committed: None, log: None };
            outbox.assign(&assignment).unwrap();
            (0..3).for_each(|offset| assert_eq!(outbox.admit(&position(epoch, offset), print(offset)), Admit::New));
        };
        assign(&mut outbox, 1);
        // The first has ended and waits for its transaction, the second is under way, the third has not begun.
        outbox.complete(position(1, 0), outcome(&position(1, 0)));
        assert_eq!(outbox.risk().calls, 1);
        outbox.forget(&partition(0));
        outbox.give_up(&position(1, 2));
        outbox.complete(position(1, 1), outcome(&position(1, 1)));
        assert_eq!((outbox.risk().calls, outbox.bytes(), outbox.left.len()), (0, 0, 0));
        assert!(outbox.begin().is_none(), "nothing of it is written");

        assign(&mut outbox, 2);
        let found = [0, 1, 2].map(|offset| outbox.kept(&position(2, offset), Instant::now()).is_some());
        assert_eq!((found, kept.lost()), ([true, true, false], 0));
    }

    #[test]
    fn an_outcome_of_a_record_that_retention_has_deleted_meanwhile_still_travels() {
        let mut outbox = Outbox::default();
        outbox.assign(&Assignment { partition: partition(0), epoch: Epoch(1), committed: None, log: None }).unwrap();
        let position = |offset| Position { partition: partition(0), epoch: Epoch(1), offset };
        (0..2).for_each(|offset| assert_eq!(outbox.admit(&position(offset), print(offset)), Admit::New));
        outbox.gone(&partition(0), Epoch(1), 9);
        for offset in 0..2 {
            outbox.complete(position(offset), outcome(&position(offset)));
            let batch = outbox.begin().expect("the outcome is dropped without a word");
            assert_eq!((batch.records.len(), batch.offsets[0].2.offset), (1, 9));
            outbox.committed();
        }
    }

    #[test]
    fn a_transaction_is_small_enough_to_be_sent_in_time() {
        let mut outbox = Outbox::default();
        outbox.assign(&Assignment { partition: partition(0), epoch: Epoch(1), committed: None, log: None }).unwrap();
        let value = Bytes::from(vec![b'x'; 900_000]);
        for offset in 0..50 {
            let position = Position { partition: partition(0), epoch: Epoch(1), offset };
            outbox.admit(&position, print(position.offset));
            outbox.complete(position, answer(value.clone()));
        }
        let mut sent = 0;
        while let Some(batch) = outbox.begin() {
            assert!(batch.records.iter().map(Outgoing::size).sum::<usize>() <= Outbox::BATCH_BYTES);
            sent += batch.records.len();
            outbox.committed();
        }
        assert_eq!((sent, outbox.bytes()), (50, 0));
    }

    #[test]
    fn a_partition_is_settled_when_its_outcomes_are_committed() {
        let mut outbox = Outbox::default();
        outbox.assign(&Assignment { partition: partition(0), epoch: Epoch(1), committed: None, log: None }).unwrap();
        let position = Position { partition: partition(0), epoch: Epoch(1), offset: 0 };
        outbox.admit(&position, print(position.offset));
        assert!(!outbox.is_settled(&partition(0)));
        outbox.complete(position.clone(), outcome(&position));
        assert!(!outbox.is_settled(&partition(0)));
        assert!(outbox.begin().is_some());
        assert!(!outbox.is_settled(&partition(0)));
        outbox.committed();
        assert!(outbox.is_settled(&partition(0)));
        assert_eq!(outbox.bytes(), 0);
    }
}

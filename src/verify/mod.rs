//! verify: checks that nothing was lost or duplicated, by comparing the topics with ClickHouse.
//!
//! Two proofs from one reading of the topics. [`rows`]: the rows of each table are exactly the records of its topic,
//! by topic, partition and offset, up to what the sink has committed, and [`strays`]: none stands beyond. [`balance`]: each request has as many ends as
//! it was asked for, or stands where some stage has still to do something for it.
//!
//! The topics move while they are read. What the stages have done is read before the topics that they write, from
//! the end of the flow to its beginning and on: so whatever a stage has done by then is seen as what it came to.
//! What still looks wrong is looked at again, and only what is wrong both times is reported. Of ends that Kafka has deleted
//! the rows tell.

pub mod balance;
mod deleted;
pub mod rows;
pub mod scope;
mod snapshot;
pub mod strays;

use std::collections::HashMap;

pub use scope::{Places, Scope, VerifyError};

use self::{
    balance::{Balance, End, Fault, Faults, Sum},
    rows::{Comparison, TopicReport},
    scope::SKEW_MS,
    snapshot::Snapshot,
    strays::Foreign,
};
use crate::{
    enqueue::feed::Few,
    kafka::{
        Partition, Record, Scan,
        ledger::Admit,
        scan::{Bounds, Piece, Span},
    },
    message::envelope::{Kind, header},
    runtime::clock::Timestamp,
    store::{
        Route,
        present::Place,
        row::{Parsed, parse},
        unended::Unended,
    },
    topics::Topic,
};

/// How often what looks wrong is looked at again.
const LOOKS: usize = 3;

/// A request with something wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unaccounted {
    /// What.
    pub fault: Fault,
    /// Its id.
    pub id: String,
    /// The item.
    pub item: String,
    /// Where it was asked for, `topic/partition/offset`.
    pub at: String,
}

/// What has been proved, or not.
#[derive(Clone, Debug)]
pub struct Report {
    /// Each topic against its table.
    pub topics: Vec<TopicReport>,
    /// Rows of other topics: said, and no fault.
    pub foreign: Vec<Foreign>,
    /// The requests.
    pub sum: Sum,
    /// Those with something wrong.
    pub unaccounted: Few<Unaccounted>,
    /// Of these, the requests that retention has deleted before they were done, as far as they are named.
    pub deleted: Vec<Unended>,
}

impl Report {
    /// Whether everything is where it should be.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.sum.lost == 0 && self.sum.doubled == 0 && self.topics.iter().all(TopicReport::is_exact)
    }
}

/// Reads both sides. `progress` is told how many offsets have been read, and of how many.
///
/// # Errors
/// [`VerifyError`]: then nothing is proved.
pub async fn run(places: Places<'_>, scope: &Scope, mut progress: impl FnMut(u64, u64)) -> Result<Report, VerifyError> {
    let snapshot = Snapshot::take(places, scope).await?;
    let mut look = Look::new(places, scope, snapshot, Some(Vec::new()));
    look.read(&mut progress).await?;
    let topics = look.topics.take().unwrap_or_default();
    let look_names = look.snapshot.names.clone();
    let lows = std::mem::take(&mut look.lows);
    let (mut balance, mut faults) = (look.balance, Faults::default());
    for _ in 1..LOOKS {
        let sum = balance.sum();
        if sum.lost == 0 && sum.doubled == 0 {
            break;
        }
        let snapshot = Snapshot::take(places, scope).await?;
        let mut again = Look::new(places, scope, snapshot, None);
        again.read(&mut progress).await?;
        faults = again.balance.confirmed(&balance);
        balance = again.balance;
        if faults.count(Fault::Lost) == balance.sum().lost && faults.count(Fault::Doubled) == balance.sum().doubled {
            break;
        }
    }
    let sum = settled(balance.sum(), &faults);
    let (unaccounted, deleted) = name(places, scope, faults, &lows).await?;
    let topics_now = places.topics.rows(places.sources);
    let foreign = strays::foreign(places.store, &topics_now, &look_names).await?;
    Ok(Report { topics, foreign, sum, unaccounted, deleted })
}

/// What was seen in the wrong place once only was moving.
fn settled(sum: Sum, faults: &Faults) -> Sum {
    let (lost, doubled) = (faults.count(Fault::Lost), faults.count(Fault::Doubled));
    Sum { lost, doubled, under_way: sum.under_way + sum.lost.saturating_sub(lost), ..sum }
}

/// One reading of everything.
struct Look<'a> {
    places: Places<'a>,
    scope: &'a Scope,
    snapshot: Snapshot,
    /// The rows are compared in the first look only.
    topics: Option<Vec<TopicReport>>,
    balance: Balance,
    /// The time of the oldest request that was read: no end of interest is older.
    oldest: Option<Timestamp>,
    /// The first offsets that are left of the requests' partitions, by the names of their logs.
    lows: Vec<(Partition, i64)>,
}

impl<'a> Look<'a> {
    fn new(places: Places<'a>, scope: &'a Scope, snapshot: Snapshot, topics: Option<Vec<TopicReport>>) -> Self {
        Self { places, scope, snapshot, topics, balance: Balance::default(), oldest: None, lows: Vec::new() }
    }

    async fn read(&mut self, progress: &mut impl FnMut(u64, u64)) -> Result<(), VerifyError> {
        let all = std::mem::take(&mut self.snapshot.bounds);
        let bounds = all.iter().flat_map(|(_, bounds)| bounds);
        let lows: HashMap<_, _> = bounds.map(|bounds| (bounds.partition.clone(), bounds.low)).collect();
        self.lows = requests_of(&all)
            .flat_map(|(_, bounds)| bounds)
            .map(|bounds| (self.snapshot.names.partition(&bounds.partition), bounds.low))
            .collect();
        let names: Vec<String> = requests_of(&all).map(|(topic, _)| topic.name.clone()).collect();
        let mut is_asked = false;
        let spans = |bounds: &[Bounds]| bounds.iter().map(|b| self.snapshot.span(b)).collect::<Vec<_>>();
        let all: Vec<(Topic, Vec<Span>)> = all.into_iter().map(|(topic, bounds)| (topic, spans(&bounds))).collect();
        let total = all.iter().flat_map(|(_, spans)| spans).map(Span::length).sum();
        let mut read = 0;
        let mut scan = Scan::open(self.places.kafka, all.iter().flat_map(|(_, spans)| spans.clone()).collect())?;
        for (topic, spans) in all {
            if topic.delay.is_some() {
                self.waiting(&mut scan, &spans).await?;
                read += spans.iter().map(Span::length).sum::<u64>();
                progress(read, total);
                continue;
            }
            if topic.kind != Kind::Request && !std::mem::replace(&mut is_asked, true) {
                // All requests on Kafka are known, and no end that is only there: so what is found now is lost, or its end
                // is about to be read.
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                let scope = (self.scope.batch.as_ref(), self.scope.since);
                let balance = &mut self.balance;
                let ask = |unended: Unended| balance.ask_if_unknown(&unended.request_id);
                self.places.store.unended(&names, &self.lows, scope, ask).await?;
            }
            let mut report = TopicReport::new(topic.name.clone(), topic.kind, self.scope.named);
            report.log = self.snapshot.names.name(&topic.name).to_owned();
            let route = Route::from(&topic);
            if let Some(since) = self.since() {
                let both = (topic.name.as_str(), self.snapshot.names.name(&topic.name));
                deleted::ends_of_former_logs(self.places.store, topic.kind, both, since, &mut self.balance).await?;
            }
            for span in spans.clone() {
                self.deleted(topic.kind, &span.partition, &lows).await?;
                let (before, start) = (read, span.range.start);
                read += span.length();
                self.partition(&mut scan, &route, span, &mut report, |offset| {
                    progress(before + u64::try_from(offset - start).unwrap_or(0), total);
                })
                .await?;
            }
            if let Some(topics) = &mut self.topics {
                let (store, place) = (self.places.store, Place::of(topic.kind));
                let log = self.snapshot.names.name(&topic.name);
                strays::beyond((self.places.kafka, store), (&topic, log), &spans, &mut report).await?;
                let doubled = report.doubled.first.iter().map(|(at, _)| *at);
                report.differing = store.differing(&place, log, doubled).await?;
                report.nobodys = store.without_request(&place, log, report.stray.first.iter().copied()).await?;
                topics.push(report);
            }
        }
        Ok(())
    }

    /// Takes what the scan brings of a delay topic: what retry has not done yet waits there, and has no row.
    async fn waiting(&mut self, scan: &mut Scan, spans: &[Span]) -> Result<(), VerifyError> {
        for Span { partition, .. } in spans {
            let mut ledger = self.snapshot.ledgers.remove(partition);
            while let Some(Piece::Records { records, .. }) = scan.next().await? {
                for record in &records {
                    let done = ledger.as_mut().is_none_or(|ledger| ledger.admit(record.offset) == Admit::Known);
                    if let Some(id) = header(&record.headers, "ce_id").filter(|_| !done) {
                        self.balance.wait_for_retry(id);
                    }
                }
            }
        }
        Ok(())
    }

    /// No end of interest is older.
    fn since(&self) -> Option<Timestamp> {
        self.oldest.map(|oldest| Timestamp::from_millis(oldest.as_millis().saturating_sub(SKEW_MS)))
    }

    /// Takes what a partition held before the first record that it still has.
    async fn deleted(
        &mut self,
        kind: Kind,
        partition: &Partition,
        lows: &HashMap<Partition, i64>,
    ) -> Result<(), VerifyError> {
        let (Some(since), Some(low)) = (self.since(), lows.get(partition)) else { return Ok(()) };
        let partition = self.snapshot.names.partition(partition);
        Ok(deleted::ends(self.places.store, kind, (&partition, *low), since, &mut self.balance).await?)
    }

    /// Takes what the scan brings of one partition.
    async fn partition(
        &mut self,
        scan: &mut Scan,
        route: &Route,
        Span { partition, range }: Span,
        report: &mut TopicReport,
        mut progress: impl FnMut(i64),
    ) -> Result<(), VerifyError> {
        let stored = self.snapshot.stored.get(&partition).copied().unwrap_or(0).min(range.end);
        let stored = range.start..stored.max(range.start);
        let mut ledger = self.snapshot.ledgers.remove(&partition);
        let compare = self.topics.is_some();
        let log = self.snapshot.names.partition(&partition);
        let mut comparison = Comparison::new(self.places.store, route.kind, log, stored);
        while let Some(Piece::Records { records, .. }) = scan.next().await? {
            for record in &records {
                if route.kind == Kind::Request {
                    self.oldest = Some(self.oldest.map_or(record.time, |oldest| oldest.min(record.time)));
                }
                let done = ledger.as_mut().is_none_or(|ledger| ledger.admit(record.offset) == Admit::Known);
                let has_row = self.account(route, &partition, record, done);
                if compare && has_row {
                    comparison.expect(record.offset, report).await?;
                }
            }
            progress(records.last().map_or(0, |record| record.offset));
        }
        if compare { Ok(comparison.finish(report).await?) } else { Ok(()) }
    }

    /// Enters a record into the balance; whether it has to have a row.
    fn account(&mut self, route: &Route, partition: &Partition, record: &Record, done: bool) -> bool {
        let raw = record.raw(partition);
        let balance = &mut self.balance;
        match parse(&raw, route) {
            Parsed::Request(received) => {
                let wanted =
                    self.scope.batch.as_ref().is_none_or(|batch| received.request.batch.as_ref() == Some(batch));
                if received.request.begins_a_chain() && wanted {
                    balance.ask(received.id.as_str());
                }
                if !done && wanted {
                    balance.wait(received.id.as_str());
                }
            }
            // fetch ends it as a dead letter that is named by its place; to which batch it belongs nobody can tell.
            Parsed::Skipped(_) => {
                if self.scope.batch.is_none() && route.kind == Kind::Request {
                    balance.ask(raw.position_id().as_str());
                    if !done {
                        balance.wait(raw.position_id().as_str());
                    }
                }
                return false;
            }
            Parsed::Result(seen) => balance.end(seen.request_id.as_str(), End::Answered(seen.status), record.time),
            Parsed::Failure(failure) if !done => balance.wait_for_retry(failure.request_id.as_str()),
            Parsed::DeadLetter(dead) => balance.end(dead.request_id.as_str(), End::Dead, record.time),
            Parsed::Failure(_) | Parsed::Change(_) | Parsed::Raw(_) => {}
            // The sink makes its dead letter, and retry that of a failure.
            Parsed::Poison(_) => return false,
        }
        true
    }
}

/// Those of the topics that hold requests and are no delay topics.
fn requests_of(all: &[(Topic, Vec<Bounds>)]) -> impl Iterator<Item = &(Topic, Vec<Bounds>)> {
    all.iter().filter(|(topic, _)| topic.kind == Kind::Request && topic.delay.is_none())
}

/// Reads the requests once more to name those with something wrong, on Kafka and of those that it has deleted.
async fn name(
    places: Places<'_>,
    scope: &Scope,
    mut faults: Faults,
    lows: &[(Partition, i64)],
) -> Result<(Few<Unaccounted>, Vec<Unended>), VerifyError> {
    let (mut named, mut deleted) = (Few::up_to(scope.named), Vec::new());
    if faults.is_empty() {
        return Ok((named, deleted));
    }
    let Places { kafka, topics, sources, .. } = places;
    for topic in topics.rows(sources).iter().filter(|topic| topic.kind == Kind::Request) {
        let route = Route::from(topic);
        let mut scan = Scan::whole(kafka, &topic.name).await?;
        while let Some(piece) = scan.next().await? {
            let Piece::Records { partition, records } = piece else { continue };
            for record in &records {
                let raw = record.raw(&partition);
                let (id, item) = match parse(&raw, &route) {
                    Parsed::Request(received) => (received.id, received.request.item.to_string()),
                    Parsed::Result(_)
                    | Parsed::Failure(_)
                    | Parsed::DeadLetter(_)
                    | Parsed::Change(_)
                    | Parsed::Raw(_)
                    | Parsed::Poison(_)
                    | Parsed::Skipped(_) => (raw.position_id(), String::new()),
                };
                if let Some(fault) = faults.take(id.as_str()) {
                    let at = raw.position_id().to_string();
                    named.add(|| Unaccounted { fault, id: id.to_string(), item, at });
                }
            }
        }
    }
    let requests: Vec<Topic> = topics.rows(sources).into_iter().filter(|topic| topic.kind == Kind::Request).collect();
    let on: Vec<&str> = requests.iter().map(|topic| topic.name.as_str()).collect();
    let take = |unended: Unended| {
        if let Some(fault) = faults.take(&unended.request_id) {
            let Unended { request_id, item, topic, partition, offset, .. } = &unended;
            let at = format!("{topic}/{partition}/{offset}");
            named.add(|| Unaccounted { fault, id: request_id.clone(), item: item.clone(), at });
            if deleted.len() < scope.named {
                deleted.push(unended);
            }
        }
    };
    places.store.unended(&on, lows, (scope.batch.as_ref(), scope.since), take).await?;
    Ok((named, deleted))
}

//! Makes a request of an old record, or says why it cannot.
//!
//! The request keeps its id, so that whatever counts ids counts it once, and the id's last end is what it came to. It
//! is asked for now: its age and attempts begin anew, and no cache answers it. What calls came to before stands in
//! `earlier`.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use bytes::Bytes;

use super::ReplayError;
use crate::{
    kafka::{
        Outgoing, Scan, admin, client,
        scan::{self, Bounds, Piece, Span},
    },
    message::{
        Attempt, MaxAge, Reason, Request, RequestId, SourceName,
        codec::{self, Encoded, REQUEST_LIMIT, Raw},
        envelope::{Envelope, Kind, header},
        trace,
    },
    runtime::clock::{Dice, Timestamp},
    store::{
        Route,
        row::{Parsed, parse},
    },
    topics::{EXPRESS, Topic, Topics},
};

/// The name of this job in `ce_source`; the name of the run follows it.
pub(super) const WRITER: &str = "weir/replay";

/// How long a request may be when it is sent again: what further calls come to has to find room in it.
const ROOM: usize = REQUEST_LIMIT * 3 / 4;

/// A request that is to be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Again {
    /// Its id, as before.
    pub id: RequestId,
    /// Whose it is.
    pub source: SourceName,
    /// What is asked for.
    pub request: Request,
}

/// Why nothing is sent for a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Skip {
    /// A retry, a failure after the first, or what an earlier run has sent: the request is sent once.
    SameChain,
    /// The dead letter of an unreadable record, which has no request to send.
    Unreadable,
    /// This dead letter has been sent again already.
    Redriven,
    /// A result does not say how it was asked for.
    Result,
    /// With parameters alone too long for a request.
    TooLong,
    /// The request is more than its topic takes; a dead letter says so.
    TooLarge,
    /// It died so long ago that the request that it may have been sent again as is deleted by now.
    OutOfSight,
    /// It was cancelled, and the run does not select cancelled requests.
    Cancelled,
}

impl Skip {
    /// The same for people.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::SameChain => "stand for a request that is already sent",
            Self::Unreadable => "are of unreadable records",
            Self::Redriven => "have been redriven before",
            Self::Result => "are results, which do not hold their request's parameters",
            Self::OutOfSight => {
                "are older than the oldest requests on Kafka, so it is unknown whether they were redriven"
            }
            Self::TooLong => "are too long for a request",
            Self::TooLarge => "are larger than their topic takes: new dead letters say so",
            Self::Cancelled => "were cancelled (--reason cancelled sends them)",
        }
    }
}

/// The dead letters that have been sent again, by the requests that this has made.
#[derive(Debug, Default)]
pub struct Redriven {
    seen: HashSet<(u128, u32)>,
    /// What of a source was sent before this is not seen any more; of the others everything is.
    since: HashMap<SourceName, Timestamp>,
}

impl Redriven {
    /// Takes note of a request on its topic.
    pub fn see(&mut self, id: &RequestId, request: &Request) {
        if request.redriven > 0 {
            self.seen.insert((digest(id), request.redriven));
        }
    }

    /// What of the source was sent before `since` has been deleted.
    pub fn forget_before(&mut self, source: &SourceName, since: Timestamp) {
        let known = self.since.entry(source.clone()).or_insert(since);
        *known = since.max(*known);
    }

    /// Takes note of all requests on a topic, and, of the bulk topic of a source, to which alone dead letters are sent again,
    /// of how far back they reach at `now`.
    ///
    /// # Errors
    /// [`ReplayError`]
    pub async fn read(&mut self, kafka: &client::Config, topic: &Topic, now: Timestamp) -> Result<(), ReplayError> {
        let source = topic.source.as_ref().filter(|_| !topic.name.ends_with(EXPRESS));
        let bounds = scan::bounds(kafka, std::slice::from_ref(&topic.name)).await?;
        let mut cut: HashSet<i32> =
            bounds.iter().filter(|bounds| bounds.low > 0).map(|bounds| bounds.partition.number).collect();
        if let Some(source) = source.filter(|_| !cut.is_empty()) {
            // Who may not ask goes by the first records.
            let kept = admin::kept_for(kafka, &topic.name).await.unwrap_or_default();
            self.forget_before(source, now.before(kept.unwrap_or(topic.keep)));
            // Where nothing but age deletes, the first record that is left says nothing: it may be a minute old where
            // little is sent.
            if kept.is_some() {
                cut.clear();
            }
        }
        let whole = |Bounds { partition, low, end }| Span { partition, range: low..end };
        let (mut scan, route) = (Scan::open(kafka, bounds.into_iter().map(whole).collect())?, Route::from(topic));
        while let Some(piece) = scan.next().await? {
            let Piece::Records { partition, records } = piece else { continue };
            for record in &records {
                // A time that is yet to come is a producer's mistake.
                if let Some(source) = source
                    && cut.remove(&partition.number)
                    && record.time <= now
                {
                    self.forget_before(source, record.time);
                }
                if let Parsed::Request(received) = parse(&record.raw(&partition), &route) {
                    self.see(&received.id, &received.request);
                }
            }
        }
        Ok(())
    }

    fn has(&self, id: &RequestId, times: u32) -> bool {
        self.seen.contains(&(digest(id), times))
    }

    /// Whether what died at this time may have been sent again without a trace.
    fn is_out_of_sight(&self, source: &SourceName, died_at: Timestamp) -> bool {
        self.since.get(source).is_some_and(|since| died_at < *since)
    }
}

/// The requests that a run has sent. What it sends stands on the topic beside what was sent before, so that the next run
/// meets both; without this each run would send twice as many as the one before.
#[derive(Clone, Debug, Default)]
pub struct Asked(HashSet<u128>);

impl Asked {
    /// Takes note of a request; whether it is the first of its id.
    pub fn is_first(&mut self, Again { id, source, request }: &Again) -> bool {
        self.insert(id, source, request)
    }

    // By the item too: an id that a careless producer has given to several items stands for each of them.
    fn insert(&mut self, id: &RequestId, source: &SourceName, request: &Request) -> bool {
        self.0.insert(digest_of([id.as_str(), source.as_str(), request.item.as_str()]))
    }

    /// Takes note of what a run sent before it was interrupted, as a request topic shows.
    ///
    /// # Errors
    /// [`ReplayError`]
    pub async fn read(&mut self, kafka: &client::Config, topic: &Topic, run: &str) -> Result<(), ReplayError> {
        let (mut scan, route, writer) = (Scan::whole(kafka, &topic.name).await?, Route::from(topic), writer(run));
        while let Some(piece) = scan.next().await? {
            let Piece::Records { partition, records } = piece else { continue };
            for record in records.iter().filter(|record| header(&record.headers, "ce_source") == Some(&writer)) {
                let Parsed::Request(received) = parse(&record.raw(&partition), &route) else { continue };
                if let Some(source) = &received.request.source {
                    self.insert(&received.id, source, &received.request);
                }
            }
        }
        Ok(())
    }
}

/// Who wrote the requests of a run.
fn writer(run: &str) -> String {
    format!("{WRITER}/{run}")
}

fn digest(id: &RequestId) -> u128 {
    digest_of([id.as_str()])
}

fn digest_of<const N: usize>(words: [&str; N]) -> u128 {
    use sha1::{Digest as _, Sha1};
    let digest = Sha1::digest(words.join("\0"));
    digest.iter().take(16).fold(0, |number, byte| number << 8 | u128::from(*byte))
}

/// What is to be sent for a record. `reason`: which dead letters are meant, if that was said.
///
/// # Errors
/// [`Skip`] if it is nothing.
pub fn again(parsed: Parsed, reason: Option<Reason>, redriven: &Redriven, now: Timestamp) -> Result<Again, Skip> {
    match parsed {
        Parsed::Request(received) if !received.request.begins_a_chain() => Err(Skip::SameChain),
        Parsed::Failure(failure) if !failure.request.begins_a_chain() => Err(Skip::SameChain),
        Parsed::Request(received) => {
            let source = received.request.source.clone().ok_or(Skip::Unreadable)?;
            anew(received.id, source, received.request, now)
        }
        Parsed::Failure(failure) => {
            let mut request = failure.request;
            request.history.push(failure.attempt);
            anew(failure.request_id, failure.source, request, now)
        }
        Parsed::DeadLetter(dead) if dead.reason == Reason::Cancelled && reason != Some(Reason::Cancelled) => {
            Err(Skip::Cancelled)
        }
        Parsed::DeadLetter(dead) => {
            let mut request = dead.request.ok_or(Skip::Unreadable)?;
            request.redriven = request.redriven.saturating_add(1);
            if redriven.has(&dead.request_id, request.redriven) {
                return Err(Skip::Redriven);
            }
            if redriven.is_out_of_sight(&dead.source, dead.died_at) {
                return Err(Skip::OutOfSight);
            }
            anew(dead.request_id, dead.source, request, now)
        }
        Parsed::Result(_) | Parsed::Change(_) => Err(Skip::Result),
        Parsed::Raw(_) | Parsed::Poison(_) | Parsed::Skipped(_) => Err(Skip::Unreadable),
    }
}

/// The request as if it were asked for now.
fn anew(id: RequestId, source: SourceName, mut request: Request, now: Timestamp) -> Result<Again, Skip> {
    let history = std::mem::take(&mut request.history);
    request.earlier.extend(history);
    request.called_at = None;
    request.source = Some(source.clone());
    request.requested_at = Some(now);
    // An end in the past would end it at once, as it may have done before.
    request.expires_at = request.expires_at.filter(|at| *at > now);
    request.max_age = Some(MaxAge(Duration::ZERO));
    shorten(&mut request);
    // With an empty history: what is too long now was as long before.
    if length(&request) > REQUEST_LIMIT { Err(Skip::TooLong) } else { Ok(Again { id, source, request }) }
}

/// Leaves the oldest attempts out until there is room for new ones.
fn shorten(request: &mut Request) {
    let sizes: Vec<usize> = request.earlier.iter().map(|attempt| json_length(attempt) + 1).collect();
    let mut surplus = length(request).saturating_sub(ROOM);
    let mut left_out = 0;
    while surplus > 0 && left_out < sizes.len() {
        surplus = surplus.saturating_sub(sizes[left_out]);
        left_out += 1;
    }
    request.earlier.drain(..left_out);
}

fn json_length(attempt: &Attempt) -> usize {
    serde_json::to_vec(attempt).map_or(0, |json| json.len())
}

fn length(request: &Request) -> usize {
    serde_json::to_vec(request).map_or(usize::MAX, |json| json.len())
}

impl Again {
    /// The record for the source's topic, in the trace of the record that it stems from, by this run.
    #[must_use]
    pub fn record(&self, raw: &Raw<'_>, topics: &Topics, run: &str, now: Timestamp, dice: &Dice) -> Outgoing {
        let writer = writer(run);
        let traceparent = trace::continued(header(raw.headers, "traceparent"), dice);
        let envelope = Envelope {
            kind: Kind::Request,
            id: self.id.as_str(),
            writer: &writer,
            time: now,
            traceparent: Some(&traceparent),
        };
        let Encoded { headers, value } = codec::encode(&envelope, &self.request);
        let key = Some(Bytes::copy_from_slice(self.request.item.as_str().as_bytes()));
        Outgoing { topic: topics.requests(&self.source).into(), key, value, headers }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Class, DeadLetter, Failure, ItemId, Lane, Origin, codec::Received};

    const NOW: Timestamp = Timestamp::from_millis(1_795_176_000_000);

    fn source() -> SourceName {
        SourceName::new("ali1688").unwrap()
    }

    fn id() -> RequestId {
        RequestId::new("monday/1").unwrap()
    }

    fn attempt(number: u32) -> Attempt {
        Attempt {
            at: NOW,
            account: None,
            class: Class::Outage,
            code: number.to_string(),
            message: "x".repeat(300),
            http_status: Some(502),
            latency_ms: number,
            not_before: None,
        }
    }

    fn request(tried: u32) -> Request {
        let mut request = Request::new(ItemId::new("1").unwrap());
        request.source = Some(source());
        request.requested_at = Some(Timestamp::from_millis(5));
        request.expires_at = Some(Timestamp::from_millis(6));
        request.calls = tried;
        request.history = (0..tried).map(attempt).collect();
        request
    }

    fn dead(request: Option<Request>) -> Parsed {
        died_of(Reason::Exhausted, request)
    }

    fn died_of(reason: Reason, request: Option<Request>) -> Parsed {
        Parsed::DeadLetter(Box::new(DeadLetter {
            request_id: id(),
            source: source(),
            reason,
            message: String::new(),
            died_at: NOW,
            origin: Origin { topic: String::new(), partition: 0, offset: 0 },
            request,
            original_base64: None,
        }))
    }

    fn sent(parsed: Parsed) -> Again {
        again(parsed, None, &Redriven::default(), NOW).unwrap()
    }

    #[test]
    fn a_dead_letter_is_asked_for_anew_under_its_id_and_keeps_its_history() {
        let Again { id: same, request, .. } = sent(dead(Some(request(3))));
        assert_eq!(same, id());
        assert_eq!((request.redriven, request.calls, request.attempts_spent()), (1, 3, 0));
        assert_eq!(request.earlier.iter().map(|a| a.latency_ms).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(request.begins_a_chain());
        assert_eq!((request.requested_at, request.expires_at), (Some(NOW), None));
        assert_eq!(request.max_age, Some(MaxAge(Duration::ZERO)));
    }

    #[test]
    fn a_dead_letter_is_sent_again_once_but_the_next_one_of_the_same_id_too() {
        let first = sent(dead(Some(request(1))));
        let mut redriven = Redriven::default();
        redriven.see(&first.id, &first.request);
        assert_eq!(again(dead(Some(request(1))), None, &redriven, NOW), Err(Skip::Redriven));
        // Earlier than anything that is still on the topic: it may have been sent again, and nobody would see.
        let mut cut = Redriven::default();
        cut.forget_before(&source(), NOW);
        assert!(again(dead(Some(request(1))), None, &cut, NOW).is_ok());
        cut.forget_before(&source(), Timestamp::from_millis(NOW.as_millis() + 1));
        cut.forget_before(&source(), NOW);
        assert_eq!(again(dead(Some(request(1))), None, &cut, NOW), Err(Skip::OutOfSight));
        let mut of_another = Redriven::default();
        of_another.forget_before(&SourceName::new("taobao").unwrap(), Timestamp::from_millis(NOW.as_millis() + 1));
        assert!(again(dead(Some(request(1))), None, &of_another, NOW).is_ok());
        let mut died_again = first.request;
        died_again.history = vec![attempt(9)];
        let second = again(dead(Some(died_again)), None, &redriven, NOW).unwrap().request;
        assert_eq!(second.redriven, 2);
        assert_eq!(second.earlier.iter().map(|a| a.latency_ms).collect::<Vec<_>>(), [0, 9]);
    }

    #[test]
    fn what_somebody_has_cancelled_is_sent_only_if_that_is_said() {
        let cancelled = || died_of(Reason::Cancelled, Some(request(1)));
        let with = |reason| again(cancelled(), reason, &Redriven::default(), NOW);
        assert_eq!(with(None), Err(Skip::Cancelled));
        assert!(with(Some(Reason::Cancelled)).is_ok());
    }

    #[test]
    fn of_each_chain_one_record_is_sent() {
        let received = |tried| Parsed::Request(Box::new(Received { id: id(), request: request(tried) }));
        let failure = |tried| {
            let (request, attempt) = (request(tried), attempt(7));
            Parsed::Failure(Box::new(Failure {
                request_id: id(),
                source: source(),
                request,
                attempt,
                lane: Lane::Bulk,
            }))
        };
        let none = Redriven::default();
        assert_eq!(sent(received(0)).request.redriven, 0);
        assert_eq!(sent(failure(0)).request.earlier.len(), 1);
        for (parsed, expected) in
            [(received(1), Skip::SameChain), (failure(1), Skip::SameChain), (dead(None), Skip::Unreadable)]
        {
            assert_eq!(again(parsed, None, &none, NOW), Err(expected));
        }
    }

    #[test]
    fn what_an_earlier_run_has_sent_is_not_sent_beside_the_request_itself() {
        let received = |item: &str| {
            let request = Request { item: ItemId::new(item).unwrap(), ..request(0) };
            Parsed::Request(Box::new(Received { id: id(), request }))
        };
        let mut asked = Asked::default();
        let first = sent(received("1"));
        assert!(asked.is_first(&first));
        let copy = Received { id: first.id.clone(), request: first.request.clone() };
        assert!(!asked.is_first(&sent(Parsed::Request(Box::new(copy)))));
        assert!(asked.is_first(&sent(received("2"))), "an id of two items");
    }

    #[test]
    fn the_oldest_history_is_left_out_where_there_is_no_room() {
        let mut long = request(100);
        long.params.insert("fields".to_owned(), "y".repeat(20_000));
        let again = sent(dead(Some(long)));
        let earlier = &again.request.earlier;
        assert!(length(&again.request) <= ROOM && length(&again.request) > ROOM - 1_000);
        assert_eq!(earlier.last().unwrap().latency_ms, 99);
        assert!(earlier.len() > 50 && earlier.len() < 100, "{}", earlier.len());
        let mut endless = request(1);
        endless.params.insert("fields".to_owned(), "y".repeat(REQUEST_LIMIT));
        assert_eq!(super::again(dead(Some(endless)), None, &Redriven::default(), NOW), Err(Skip::TooLong));
    }

    #[test]
    fn the_record_is_what_fetch_reads_in_the_trace_of_the_old_one() {
        let again = sent(dead(Some(request(2))));
        let trace = "0af7651916cd43dd8448eb211c80319c";
        let headers = vec![("traceparent".into(), format!("00-{trace}-b7ad6b7169203331-01").into())];
        let raw = Raw { topic: "d", partition: 0, offset: 0, time: NOW, headers: &headers, value: None };
        let topics = Topics::new(crate::topics::Config::default());
        let record = again.record(&raw, &topics, "0199", NOW, &Dice::seeded(1));
        let read = Raw { headers: &record.headers, value: Some(&record.value), ..raw };
        let received = codec::read_request(&read, &source()).unwrap();
        assert_eq!((received.id, received.request), (again.id, again.request));
        assert!(header(&record.headers, "traceparent").unwrap().contains(trace));
        assert_eq!(header(&record.headers, "ce_source"), Some("weir/replay/0199"));
        assert_eq!(&*record.topic, "weir.requests.ali1688");
    }
}

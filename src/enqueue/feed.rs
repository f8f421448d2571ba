//! Lines → records for the request topic, a chunk at a time.

use std::{
    collections::BTreeMap,
    io::{self, BufRead},
    ops::ControlFlow,
    sync::Arc,
};

use bytes::Bytes;

use super::{
    duplicates::{Seen, digest},
    lines::{Lines, Wrong, read_line},
};
use crate::{
    kafka::Outgoing,
    message::{
        BatchId, MaxAge, Request, RequestId, SourceName, codec,
        envelope::{Envelope, Kind},
        trace,
    },
    runtime::clock::{Clock, Dice, Timestamp},
};

/// Records of a chunk: enough for full batches on the wire, few enough to stop quickly.
const CHUNK: usize = 5_000;

/// Wrong lines and duplicates that are named; the rest is counted.
pub const NAMED: usize = 20;

/// What is asked for with every line.
#[derive(Clone, Debug)]
pub struct Order {
    /// Whose items they are.
    pub source: SourceName,
    /// Its request topic.
    pub topic: Arc<str>,
    /// What they are submitted as.
    pub batch: BatchId,
    /// Parameters of every request; a line's own go before them.
    pub params: BTreeMap<String, String>,
    /// When they expire; a line's own time goes before it.
    pub expires_at: Option<Timestamp>,
    /// How old their answers may be; a line's own age goes before it.
    pub max_age: Option<MaxAge>,
}

/// Records to be sent together.
#[derive(Debug)]
pub struct Chunk {
    /// The records.
    pub records: Vec<Outgoing>,
    /// How many bytes of the input have been read up to here.
    pub bytes: u64,
}

/// The first few of something, and how many there were in all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Few<T> {
    /// At most as many as are to be named.
    pub first: Vec<T>,
    /// All of them.
    pub count: u64,
    named: usize,
}

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self::up_to(NAMED)
    }
}

impl<T> Few<T> {
    /// None yet; `named` of them will be kept.
    #[must_use]
    pub const fn up_to(named: usize) -> Self {
        Self { first: Vec::new(), count: 0, named }
    }

    /// Counts one, and keeps it if it is among the first.
    pub fn add(&mut self, one: impl FnOnce() -> T) {
        self.count += 1;
        if self.first.len() < self.named {
            self.first.push(one());
        }
    }
}

/// What has become of the lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Records handed over.
    pub requests: u64,
    /// Lines that are neither id nor request.
    pub wrong: Few<Wrong>,
    /// Lines that ask for what an earlier line asks for: number and item.
    pub duplicates: Few<(u64, String)>,
}

/// Reads `input` to its end and hands records to `deliver`, until that breaks off.
///
/// # Errors
/// What reading the input fails with; what was read before has been delivered.
pub fn feed(
    input: impl BufRead,
    order: &Order,
    clock: &Clock,
    dice: &Dice,
    mut deliver: impl FnMut(Chunk) -> ControlFlow<()>,
) -> io::Result<Summary> {
    let mut lines = Lines::new(input);
    let mut seen = Seen::default();
    let mut summary = Summary::default();
    let mut records = Vec::new();
    let outcome = loop {
        let now = clock.now();
        let (number, line) = match lines.next_line() {
            Ok(Some(line)) => line,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        };
        match read_line(line, &order.source, now).and_then(|request| request.map(|r| order.complete(r)).transpose()) {
            Ok(None) => continue,
            Err(why) => summary.wrong.add(|| Wrong { line: number, why }),
            Ok(Some(request)) if !seen.is_new(&request) => {
                summary.duplicates.add(|| (number, request.item.as_str().to_owned()));
            }
            Ok(Some(request)) => records.push(order.record(&request, now, dice)),
        }
        if records.len() == CHUNK {
            summary.requests += CHUNK as u64;
            let chunk = Chunk { records: std::mem::take(&mut records), bytes: lines.bytes() };
            if deliver(chunk).is_break() {
                return Ok(summary);
            }
        }
    };
    summary.requests += records.len() as u64;
    if !records.is_empty() {
        // It was the last one: nothing is left to break off.
        let _ = deliver(Chunk { records, bytes: lines.bytes() });
    }
    outcome.map(|()| summary)
}

impl Order {
    /// The request with what the order says about all of them.
    fn complete(&self, mut request: Request) -> Result<Request, String> {
        if let Some(other) = request.batch.as_ref().filter(|batch| **batch != self.batch) {
            return Err(format!("the line says batch {other:?}, the command {:?}: remove one of them", self.batch));
        }
        request.batch = Some(self.batch.clone());
        for (name, value) in &self.params {
            request.params.entry(name.clone()).or_insert_with(|| value.clone());
        }
        request.expires_at = request.expires_at.or(self.expires_at);
        request.max_age = request.max_age.or(self.max_age);
        // A line may be an old record: what earlier calls came to does not count against this request.
        request.history.clear();
        request.earlier.clear();
        request.called_at = None;
        request.redriven = 0;
        Ok(request)
    }

    fn record(&self, request: &Request, now: Timestamp, dice: &Dice) -> Outgoing {
        let id = request_id(&self.batch, request);
        let traceparent = trace::continued(None, dice);
        let envelope = Envelope {
            kind: Kind::Request,
            id: id.as_str(),
            writer: "weir/enqueue",
            time: now,
            traceparent: Some(&traceparent),
        };
        let encoded = codec::encode(&envelope, request);
        Outgoing {
            topic: self.topic.clone(),
            key: Some(Bytes::copy_from_slice(request.item.as_str().as_bytes())),
            value: encoded.value,
            headers: encoded.headers,
        }
    }
}

/// The id of a request: `<batch>/<item>`, with parameters `<batch>/<item>?<digest of both>`.
///
/// So enqueueing a batch twice asks twice under the same ids, and everything that counts requests counts each once.
fn request_id(batch: &BatchId, request: &Request) -> RequestId {
    let digest = hex::encode(&digest(request)[..8]);
    let item = &request.item;
    let text = if request.params.is_empty() { format!("{batch}/{item}") } else { format!("{batch}/{item}?{digest}") };
    RequestId::new(text).unwrap_or_else(|_| short_id(batch, &digest))
}

/// For an item whose name leaves no room: a batch has at most 128 bytes, so this always fits.
#[allow(clippy::expect_used, reason = "128 + 18 bytes without white space are a valid id of at most 256")]
fn short_id(batch: &BatchId, digest: &str) -> RequestId {
    RequestId::new(format!("{batch}/?{digest}")).expect("a batch and a digest are a valid id")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{ItemId, codec::Raw, envelope::header};

    fn order() -> Order {
        Order {
            source: SourceName::new("ali1688").unwrap(),
            topic: "weir.requests.ali1688".into(),
            batch: BatchId::new("monday").unwrap(),
            params: BTreeMap::from([("zip".to_owned(), "1".to_owned())]),
            expires_at: Some(Timestamp::from_millis(9_000)),
            max_age: Some(MaxAge(std::time::Duration::from_secs(60))),
        }
    }

    fn run(text: &[u8], order: &Order) -> (Vec<Outgoing>, Summary) {
        let (clock, dice) = (Clock::simulated(Timestamp::from_millis(1_000)), Dice::seeded(1));
        let mut records = Vec::new();
        let summary = feed(text, order, &clock, &dice, |chunk| {
            assert!(chunk.records.len() <= CHUNK);
            records.extend(chunk.records);
            ControlFlow::Continue(())
        });
        (records, summary.unwrap())
    }

    fn read(record: &Outgoing) -> codec::Received {
        let raw = Raw {
            topic: &record.topic,
            partition: 0,
            offset: 0,
            time: Timestamp::default(),
            headers: &record.headers,
            value: Some(&record.value),
        };
        codec::read_request(&raw, &order().source).unwrap()
    }

    #[tokio::test]
    async fn a_record_is_what_fetch_reads_keyed_by_its_item() {
        let order = Order { params: BTreeMap::new(), ..order() };
        let (records, _) = run(b"42\n", &order);
        let received = read(&records[0]);
        assert_eq!(records[0].key.as_deref(), Some(&b"42"[..]));
        assert_eq!(received.id.as_str(), "monday/42");
        assert_eq!(received.request.batch.as_ref().unwrap().as_str(), "monday");
        assert_eq!(received.request.expires_at, Some(Timestamp::from_millis(9_000)));
        assert_eq!(received.request.oldest_answer(), Some(std::time::Duration::from_secs(60)));
        assert_eq!(received.request.requested_at, Some(Timestamp::from_millis(1_000)));
        assert!(header(&records[0].headers, "traceparent").unwrap().starts_with("00-"));
    }

    #[tokio::test]
    async fn wrong_lines_and_duplicates_are_named_and_do_not_stop_the_rest() {
        let (records, summary) =
            run(b"1\n\nbad id\n2\n1\n# 3\n{\"item\":\"2\"}\n{\"item\":\"4\",\"batch\":\"x\"}\n5", &order());
        let items: Vec<_> = records.iter().map(|record| read(record).request.item.as_str().to_owned()).collect();
        assert_eq!(items, ["1", "2", "5"]);
        assert_eq!(summary.requests, 3);
        assert_eq!(summary.wrong.first.iter().map(|wrong| wrong.line).collect::<Vec<_>>(), [3, 8]);
        assert_eq!(summary.duplicates.first, [(5, "1".to_owned()), (7, "2".to_owned())]);
    }

    #[tokio::test]
    async fn the_parameters_and_the_expiry_of_a_line_go_before_those_of_the_command() {
        let (records, _) =
            run(br#"{"item":"1","params":{"zip":"2","a":"b"},"expires_at":5000,"history":[]}"#, &order());
        let received = read(&records[0]);
        assert_eq!(received.request.params["zip"], "2");
        assert_eq!(received.request.params["a"], "b");
        assert_eq!(received.request.expires_at, Some(Timestamp::from_millis(5_000)));
    }

    #[tokio::test]
    async fn many_wrong_lines_are_counted_but_only_the_first_are_kept() {
        let (_, summary) = run("a b\n".repeat(1_000).as_bytes(), &order());
        assert_eq!((summary.wrong.count, summary.wrong.first.len()), (1_000, NAMED));
    }

    #[tokio::test]
    async fn breaking_off_ends_it_after_the_chunk() {
        let lines: Vec<_> = (0..3 * CHUNK).map(|n| n.to_string()).collect();
        let text = lines.join("\n");
        let (clock, dice) = (Clock::System, Dice::seeded(1));
        let summary = feed(text.as_bytes(), &order(), &clock, &dice, |_| ControlFlow::Break(())).unwrap();
        assert_eq!(summary.requests, CHUNK as u64);
    }

    #[test]
    fn the_same_request_has_the_same_id_and_another_one_another() {
        let batch = BatchId::new("b".repeat(BatchId::LIMIT)).unwrap();
        let long = |last: char| Request::new(ItemId::new("i".repeat(255) + &last.to_string()).unwrap());
        assert_eq!(request_id(&batch, &long('a')), request_id(&batch, &long('a')));
        assert_ne!(request_id(&batch, &long('a')), request_id(&batch, &long('b')));
        let mut with = Request::new(ItemId::new("1").unwrap());
        let without = with.clone();
        with.params.insert("zip".to_owned(), "1".to_owned());
        assert_ne!(request_id(&batch, &with), request_id(&batch, &without));
    }
}

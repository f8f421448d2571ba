//! Failed requests, and what a reader sees of them when they come again.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use rdkafka::{
    Message,
    consumer::BaseConsumer,
    message::{BorrowedMessage, Header, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer},
};
use weir::{
    kafka::admin,
    message::{Attempt, Class, Failure, ItemId, Lane, Request, RequestId, SourceName, envelope::Kind},
    runtime::clock::Timestamp,
    topics::Groups,
};

use crate::{
    log::{self, Copied, PATIENCE},
    process::{Bench, OwnTopics},
};

/// Milliseconds since 1970.
pub fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// A request that has come again.
pub struct Again {
    /// What kind of failure it was.
    pub kind: String,
    /// When it was due, in milliseconds since 1970.
    pub due_at: i64,
    /// When a reader of committed records saw it, in milliseconds since 1970.
    pub seen_at: i64,
}

/// Topics, a producer of failures, and a reader of requests.
pub struct Scene {
    pub own: OwnTopics,
    source: SourceName,
    group: String,
    producer: BaseProducer,
    reader: Reader,
    failed: u64,
}

impl Scene {
    pub async fn new(bench: &Bench) -> Result<Self> {
        let own = bench.topics("retry").await?;
        let requests = own.topics.requests(&bench.source);
        Ok(Self {
            source: bench.source.clone(),
            group: Groups::new(own.prefix()).retry(),
            producer: log::producer(&bench.kafka.brokers)?,
            reader: Reader::start(log::Follower::of(&bench.kafka, &[requests]).await?.into_inner()),
            failed: 0,
            own,
        })
    }

    /// So many requests of this kind fail now and are due at that time.
    pub fn fail(&mut self, kind: &str, count: usize, due_at: i64) -> Result<()> {
        let topic = self.own.topics.failures();
        for _ in 0..count {
            self.failed += 1;
            // Whoever sees it again knows from its id what it is.
            let id = format!("{kind}-{due_at}-{:09}", self.failed);
            let value = serde_json::to_vec(&self.failure(&id, due_at)?)?;
            let ce_type = Header { key: "ce_type", value: Some(Kind::Failure.ce_type()) };
            let record = BaseRecord::to(&topic).key(id.as_bytes()).payload(value.as_slice());
            log::send(&self.producer, record.headers(OwnedHeaders::new().insert(ce_type)))?;
            self.producer.poll(Duration::ZERO);
        }
        self.producer.flush(PATIENCE).context("writing failures")
    }

    fn failure(&self, id: &str, due_at: i64) -> Result<Failure> {
        let now = Timestamp::from_millis(now_ms());
        let mut request = Request::new(ItemId::new(id)?);
        request.source = Some(self.source.clone());
        request.requested_at = Some(now);
        let attempt = Attempt {
            at: now,
            account: None,
            class: Class::Throttled,
            code: "gw.QosAppFrequencyLimit".to_owned(),
            message: "App call exceed the frequency limit".to_owned(),
            http_status: Some(400),
            latency_ms: 5,
            not_before: Some(Timestamp::from_millis(due_at)),
        };
        Ok(Failure { request_id: RequestId::new(id)?, source: self.source.clone(), lane: Lane::Bulk, request, attempt })
    }

    /// How many failures retry has not dealt with yet, transaction markers included.
    pub async fn behind(&self, bench: &Bench) -> Result<i64> {
        let lags = admin::lag(&bench.kafka, &self.group, &[self.own.topics.failures()]).await?;
        Ok(lags.iter().map(admin::Lag::behind).sum())
    }

    /// Waits until `count` requests of this kind have come again; all of them.
    pub fn come_again(&self, kind: &str, count: usize, mut well: impl FnMut() -> Result<()>) -> Result<Vec<Again>> {
        let mut came = vec![];
        let mut last = std::time::Instant::now();
        while came.len() < count {
            let new = self.reader.take(kind);
            if !new.is_empty() {
                last = std::time::Instant::now();
            }
            came.extend(new);
            well()?;
            ensure!(last.elapsed() < PATIENCE, "{} of {count} {kind}, and no more for {PATIENCE:?}", came.len());
            std::thread::sleep(Duration::from_millis(2));
        }
        ensure!(came.len() == count, "{} of {count} {kind} came: some twice", came.len());
        Ok(came)
    }

    /// A record as retry writes it.
    pub fn sample(&self) -> Result<Copied> {
        self.reader.sample.lock().unwrap_or_else(PoisonError::into_inner).take().context("no request has come yet")
    }

    pub async fn delete(self) -> Result<()> {
        drop(self.reader);
        self.own.delete().await
    }
}

/// A thread that notes when each request becomes visible.
struct Reader {
    seen: Arc<Mutex<Vec<Again>>>,
    sample: Arc<Mutex<Option<Copied>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    fn start(consumer: BaseConsumer) -> Self {
        let (seen, sample, stop) = (Arc::default(), Arc::default(), Arc::default());
        let mut reader = Self { seen, sample, stop, thread: None };
        let (seen, sample) = (Arc::clone(&reader.seen), Arc::clone(&reader.sample));
        let stop = Arc::clone(&reader.stop);
        reader.thread = Some(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if let Some(Ok(message)) = consumer.poll(Duration::from_millis(50)) {
                    seen.lock().unwrap_or_else(PoisonError::into_inner).extend(again(&message));
                    let mut sample = sample.lock().unwrap_or_else(PoisonError::into_inner);
                    sample.get_or_insert_with(|| Copied::of(&message));
                }
            }
        }));
        reader
    }

    /// What has come of this kind since the last time.
    fn take(&self, kind: &str) -> Vec<Again> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.extract_if(.., |again| again.kind == kind).collect()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It can only have panicked; then the measurement has failed already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn again(message: &BorrowedMessage<'_>) -> Option<Again> {
    let seen_at = now_ms();
    let mut parts = std::str::from_utf8(message.key()?).ok()?.split('-');
    let (kind, due_at) = (parts.next()?.to_owned(), parts.next()?.parse().ok()?);
    Some(Again { kind, due_at, seen_at })
}

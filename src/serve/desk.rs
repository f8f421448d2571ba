//! Item lookup: answers a request for one item from the cache, or sends a request and waits for its outcome.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};

use crate::{
    cache::{Answer, Kept, Key, Seen, SourceCache},
    kafka::{Producer, ReadError, Record, WriteError, client, tail::Tail},
    message::{
        DeadLetter, ItemId, MaxAge, Observation, Request, RequestId, SourceName, Status, Via, codec,
        envelope::{Envelope, Kind, header},
        trace,
    },
    runtime::clock::{Clock, Dice, Timestamp},
    topics::Topics,
};

/// `ce_source` of what is written here.
const WRITER: &str = "weir/serve";

/// How long after its own start a desk waits for Redis to be connected; then an item is looked for without it.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

/// An item that is asked for early is not asked for again so soon.
const REFRESH_EVERY: Duration = Duration::from_secs(10);

/// How many items are remembered for that.
const REFRESHED: usize = 10_000;

/// One source as the desk knows it.
#[derive(Clone, Debug)]
pub struct SourceParts {
    /// Its name.
    pub name: SourceName,
    /// Where requests go: the express lane, if there is one.
    pub topic: Arc<str>,
    /// Its cache, if its answers are given again.
    pub cache: Option<SourceCache>,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Question {
    /// Of which source.
    pub source: SourceName,
    /// Which item.
    pub item: ItemId,
    /// Parameters of the vendor's API.
    pub params: BTreeMap<String, String>,
    /// How old the answer may be; `None`: as the source has it.
    pub max_age: Option<Duration>,
    /// How long to wait for the answer.
    pub wait: Duration,
}

/// An item as it is given.
#[derive(Clone, Debug)]
pub struct Given {
    /// Whose item it is: another source may have stood in for the one that was asked for.
    pub source: SourceName,
    /// What the vendor said.
    pub answer: Arc<Answer>,
    /// When.
    pub fetched_at: Timestamp,
    /// Where the answer came from.
    pub via: Via,
    /// Until when it is fresh, and until when it counts at all; without a cache neither is known.
    pub ends: Option<(Timestamp, Timestamp)>,
}

/// What came of a question.
#[derive(Clone, Debug)]
pub enum Answered {
    /// The item; also that there is none.
    Item(Given),
    /// Its request was given up.
    GivenUp(Box<DeadLetter>),
    /// There was no outcome in time; the last failure of its call, if there was one. It is still asked for.
    Late(Option<String>),
}

/// Why a question could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The source.
    #[error("there is no source {0}")]
    NoSource(SourceName),
    /// Too many wait already.
    #[error("{0} requests are waiting already, the most that [serve] waiting allows")]
    Busy(usize),
    /// The request was not taken.
    #[error("cannot send the request to Kafka: {0}")]
    Write(#[from] WriteError),
}

/// What is heard of a request.
enum Heard {
    Item(Box<Observation>),
    Failed(String),
    Dead(Box<DeadLetter>),
}

/// Asks and hears.
pub struct Desk {
    sources: Vec<SourceParts>,
    topics: Topics,
    kafka: client::Config,
    producer: Producer,
    clock: Clock,
    dice: Dice,
    started_at: Instant,
    /// How many questions may wait at once.
    places: Semaphore,
    waiting_max: usize,
    waiting: Mutex<HashMap<RequestId, mpsc::Sender<Heard>>>,
    /// One at a time asks for a key; the others find what it brought.
    asking: Mutex<HashMap<Key, Arc<tokio::sync::Mutex<()>>>>,
    refreshed: Mutex<HashMap<Key, Instant>>,
    /// Items that are asked for in the background.
    refreshing: Mutex<JoinSet<()>>,
}

/// Forgets who waits, whatever becomes of them.
struct Waiting<'a>(&'a Desk, RequestId);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting().remove(&self.1);
    }
}

impl Desk {
    /// A desk for these sources; at most `waiting` questions wait at once.
    ///
    /// # Errors
    /// [`WriteError`]: `[kafka.properties]` cannot be used.
    pub fn new(
        sources: Vec<SourceParts>,
        topics: Topics,
        kafka: &client::Config,
        (clock, dice): (Clock, Dice),
        waiting: usize,
    ) -> Result<Self, WriteError> {
        Ok(Self {
            sources,
            topics,
            producer: Producer::new(kafka)?,
            kafka: kafka.clone(),
            clock,
            dice,
            started_at: Instant::now(),
            places: Semaphore::new(waiting),
            waiting_max: waiting,
            waiting: Mutex::default(),
            asking: Mutex::default(),
            refreshed: Mutex::default(),
            refreshing: Mutex::default(),
        })
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<RequestId, mpsc::Sender<Heard>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn source(&self, name: &SourceName) -> Result<&SourceParts, AskError> {
        let source = self.sources.iter().find(|source| source.name == *name);
        source.ok_or_else(|| AskError::NoSource(name.clone()))
    }

    /// The time of day.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Opens the topics of outcomes at their end: what is asked after that is heard of by [`Self::listen`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn open(&self) -> Result<Tail, ReadError> {
        let topics = [self.topics.results(), self.topics.failures(), self.topics.dead()];
        Tail::open(&self.kafka, &topics).await
    }

    /// Passes on what comes of the questions, for ever.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn listen(&self, mut tail: Tail) -> Result<std::convert::Infallible, ReadError> {
        let (results, failures) = (self.topics.results(), self.topics.failures());
        loop {
            let (partition, record) = tail.next().await?;
            // The id is in the headers: the records of everybody else are not read.
            let Some(sender) = self.waits_for(&record) else { continue };
            let raw = record.raw(&partition);
            let heard = if *partition.topic == *results {
                codec::read_observation(&raw).ok().map(|seen| Heard::Item(Box::new(seen)))
            } else if *partition.topic == *failures {
                codec::read_failure(&raw).ok().map(|failure| Heard::Failed(failure.attempt.message))
            } else {
                codec::read_dead_letter(&raw).ok().map(|dead| Heard::Dead(Box::new(dead)))
            };
            if let Some(heard) = heard {
                // Whoever has no room for it has heard enough.
                let _ = sender.try_send(heard);
            }
        }
    }

    fn waits_for(&self, record: &Record) -> Option<mpsc::Sender<Heard>> {
        let id = header(&record.headers, "ce_id")?;
        // Results and failures count the calls behind the id of the request.
        let id = id.split_once('#').map_or(id, |(id, _)| id);
        self.waiting().get(&RequestId::new(id).ok()?).cloned()
    }

    /// The item: from the cache, or by a request.
    ///
    /// # Errors
    /// [`AskError`].
    ///
    /// # Cancellation
    /// Safe; what was asked for is answered all the same, for the cache and the tables.
    pub async fn ask(&self, question: &Question) -> Result<Answered, AskError> {
        let source = self.source(&question.source)?;
        let deadline = Instant::now() + question.wait;
        let request = self.request(question);
        let keyed = source.cache.as_ref().and_then(|cache| Some((cache, cache.key(&request)?)));
        if let Some((cache, key)) = &keyed
            && let Some(given) = self.kept(source, cache, key, question).await
        {
            return Ok(Answered::Item(given));
        }
        // Whoever waits for the same item as others waits, too.
        let Ok(_place) = self.places.try_acquire() else { return Err(AskError::Busy(self.waiting_max)) };
        let Some((cache, key)) = keyed else { return self.call(source, request, None, deadline).await };
        let lock = self.lock(&key);
        let Ok(_one) = timeout_at(deadline, lock.lock()).await else { return Ok(late(Some(cache), &request, None)) };
        // Somebody may have asked meanwhile.
        if let Some(given) = self.kept(source, cache, &key, question).await {
            return Ok(Answered::Item(given));
        }
        self.call(source, request, Some((cache, &key)), deadline).await
    }

    /// The item if the cache has it: without Kafka.
    ///
    /// # Errors
    /// [`AskError::NoSource`].
    pub async fn look(&self, question: &Question) -> Result<Option<Given>, AskError> {
        let source = self.source(&question.source)?;
        let request = self.request(question);
        let Some(cache) = &source.cache else { return Ok(None) };
        let Some(key) = cache.key(&request) else { return Ok(None) };
        Ok(self.kept(source, cache, &key, question).await)
    }

    /// Sends the requests, and waits for nothing.
    ///
    /// # Errors
    /// [`AskError`].
    pub async fn send(&self, source: &SourceName, questions: &[Question]) -> Result<(), AskError> {
        let source = self.source(source)?;
        let record = |question: &Question| self.record(source, &self.request(question), &self.id());
        Ok(self.producer.send(questions.iter().map(record).collect()).await?)
    }

    fn lock(&self, key: &Key) -> Arc<tokio::sync::Mutex<()>> {
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        // Whom nobody holds any more.
        if asking.len() > self.waiting_max {
            asking.retain(|_, lock| Arc::strong_count(lock) > 1);
        }
        Arc::clone(asking.entry(key.clone()).or_default())
    }

    fn request(&self, question: &Question) -> Request {
        Request {
            source: Some(question.source.clone()),
            params: question.params.clone(),
            requested_at: Some(self.now()),
            max_age: question.max_age.map(MaxAge),
            ..Request::new(question.item.clone())
        }
    }

    /// What the cache has for it. An answer that is due is given, and asked for anew in the background.
    async fn kept(&self, source: &SourceParts, cache: &SourceCache, key: &Key, question: &Question) -> Option<Given> {
        if question.max_age == Some(Duration::ZERO) {
            return None;
        }
        let seen = match cache.near(key, question.max_age) {
            Seen::Hit(kept) => {
                cache.counts().near.inc();
                return Some(given(&source.name, &kept, Via::Cache));
            }
            Seen::Due(kept) => Some(kept),
            Seen::Miss => None,
        };
        cache.connected(CONNECT_WITHIN.saturating_sub(self.started_at.elapsed())).await;
        let counts = cache.counts();
        let (kept, is_due, by) = match cache.peek(key, question.max_age).await {
            Seen::Hit(kept) => (Some(kept), false, &counts.far),
            Seen::Due(kept) => (Some(kept), true, &counts.far),
            Seen::Miss => (seen, true, &counts.near),
        };
        let kept = kept?;
        by.inc();
        if is_due && self.may_refresh(key) {
            let request = self.request(&Question { max_age: None, ..question.clone() });
            self.refresh(self.record(source, &request, &self.id()));
        }
        Some(given(&source.name, &kept, Via::Cache))
    }

    /// Sends a refresh request in the background. The caller has its answer already; if sending fails, the next lookup
    /// sends again.
    fn refresh(&self, record: crate::kafka::Outgoing) {
        let producer = self.producer.clone();
        let mut refreshing = self.refreshing.lock().unwrap_or_else(PoisonError::into_inner);
        while refreshing.try_join_next().is_some() {}
        refreshing.spawn(async move { drop(producer.send(vec![record]).await) });
    }

    /// Waits for what is sent in the background, for so long at most: before a command ends.
    pub async fn finish(&self, within: Duration) {
        let mut refreshing = std::mem::take(&mut *self.refreshing.lock().unwrap_or_else(PoisonError::into_inner));
        let _ = timeout(within, async { while refreshing.join_next().await.is_some() {} }).await;
    }

    fn may_refresh(&self, key: &Key) -> bool {
        let (mut refreshed, now) = (self.refreshed.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        if refreshed.len() >= REFRESHED {
            refreshed.retain(|_, at| now - *at < REFRESH_EVERY);
        }
        if refreshed.get(key).is_some_and(|at| now - *at < REFRESH_EVERY) || refreshed.len() >= REFRESHED {
            return false;
        }
        refreshed.insert(key.clone(), now);
        true
    }

    fn id(&self) -> RequestId {
        let id = format!("get-{:032x}", self.dice.bits());
        let Ok(id) = RequestId::new(id) else { unreachable!("hexadecimal digits are always an id") };
        id
    }

    fn record(&self, source: &SourceParts, request: &Request, id: &RequestId) -> crate::kafka::Outgoing {
        let traceparent = trace::continued(None, &self.dice);
        let envelope = Envelope {
            kind: Kind::Request,
            id: id.as_str(),
            writer: WRITER,
            time: self.now(),
            traceparent: Some(&traceparent),
        };
        let codec::Encoded { headers, value } = codec::encode(&envelope, request);
        let key = Some(bytes::Bytes::copy_from_slice(request.item.as_str().as_bytes()));
        crate::kafka::Outgoing { topic: Arc::clone(&source.topic), key, value, headers }
    }

    /// By a request.
    async fn call(
        &self,
        source: &SourceParts,
        request: Request,
        keyed: Option<(&SourceCache, &Key)>,
        deadline: Instant,
    ) -> Result<Answered, AskError> {
        let id = self.id();
        let (sender, mut heard) = mpsc::channel(4);
        self.waiting().insert(id.clone(), sender);
        let _waiting = Waiting(self, id.clone());
        let cache = keyed.map(|(cache, _)| cache);
        let sent = self.producer.send(vec![self.record(source, &request, &id)]);
        let Ok(sent) = timeout_at(deadline, sent).await else {
            return Ok(late(cache, &request, Some("Kafka has not accepted the request".to_owned())));
        };
        sent?;
        let mut failure = None;
        loop {
            match timeout_at(deadline, heard.recv()).await {
                Ok(Some(Heard::Item(seen))) => return Ok(Answered::Item(answered(*seen, &source.name, keyed))),
                // It will be tried again; whoever waits here takes what there is.
                Ok(Some(Heard::Failed(message))) => match late(cache, &request, Some(message)) {
                    Answered::Late(message) => failure = message,
                    given @ (Answered::Item(_) | Answered::GivenUp(_)) => return Ok(given),
                },
                Ok(Some(Heard::Dead(dead))) => return Ok(Answered::GivenUp(dead)),
                Ok(None) | Err(_) => return Ok(late(cache, &request, failure)),
            }
        }
    }
}

/// There is no answer in time: an older one, if there is one.
fn late(cache: Option<&SourceCache>, request: &Request, failure: Option<String>) -> Answered {
    let kept = cache.and_then(|cache| cache.stale(request)).zip(request.source.as_ref());
    kept.map_or(Answered::Late(failure), |(kept, source)| Answered::Item(given(source, &kept, Via::Stale)))
}

fn given(source: &SourceName, kept: &Kept, via: Via) -> Given {
    let ends = Some((kept.ends.soft_at, kept.ends.hard_at));
    Given { source: source.clone(), answer: Arc::clone(&kept.answer), fetched_at: kept.ends.fetched_at, via, ends }
}

/// A result as it is given; this process remembers it, too, unless another source has stood in: that one's answer is
/// none of the source that was asked for, and nobody is to keep it as such.
fn answered(seen: Observation, asked: &SourceName, keyed: Option<(&SourceCache, &Key)>) -> Given {
    let (fetched_at, via, source) = (seen.fetched_at, seen.via, seen.source);
    let answer = Answer { status: seen.status, columns: seen.columns, fingerprint: seen.fingerprint, raw: seen.raw };
    match keyed {
        Some((cache, key)) if source == *asked => given(&source, &cache.hear(key, answer, fetched_at), via),
        Some(_) | None => Given { source, answer: Arc::new(answer), fetched_at, via, ends: None },
    }
}

impl Given {
    /// Whether there is such an item.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.answer.status != Status::Absent
    }
}

#[cfg(test)]
#[path = "desk_tests.rs"]
mod tests;

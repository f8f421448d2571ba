//! Uncommitted answers that a role keeps when it loses its partitions and has to rejoin its consumer group.
//!
//! A role that has to rejoin (its session timed out, its producer was fenced) reads the same requests again. Answers
//! that were paid for already are looked up here, by the request's partition and offset and a fingerprint of its
//! record, so that a record of a re-created topic is not taken for it. The group's commit alone decides whether an
//! answer is still needed: a completed request is not read again.
//!
//! All of it is memory of the process: kill -9 loses it.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{Outgoing, Partition, Record};

/// What a request has come to, before it is committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What is to be written for it.
    pub records: Vec<Outgoing>,
    /// How many calls would have to be made again if it were lost. One call that served many requests counts for the
    /// last of them.
    pub calls: u32,
    /// When the call ended.
    pub since: Instant,
}

impl Answer {
    /// Bytes of its records.
    #[must_use]
    pub fn size(&self) -> usize {
        self.records.iter().map(Outgoing::size).sum()
    }
}

/// What tells a record from any other that may come to stand at its offset. Only good within one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Print(u64);

impl Print {
    /// Of its log, time, key, value and headers: the last hold the id that its producer gave it.
    #[must_use]
    pub fn of(record: &Record) -> Self {
        let mut hasher = DefaultHasher::new();
        (&record.log, record.time.as_millis(), &record.key, &record.value).hash(&mut hasher);
        for (name, value) in &record.headers {
            (name.as_bytes(), value).hash(&mut hasher);
        }
        Self(hasher.finish())
    }
}

/// Answers by the place of their request. Clones share it: it belongs to the role, and not to one of its lives.
#[derive(Clone, Debug, Default)]
pub struct Kept(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    answers: HashMap<Partition, BTreeMap<i64, (Print, Answer)>>,
    bytes: usize,
    /// How many bytes there may be.
    limit: usize,
    lost: u64,
    /// How many of them have been told of.
    told: u64,
}

impl Kept {
    /// Answers are kept for so long: by then another worker has asked again, if the partition went there for good.
    const FOR: Duration = Duration::from_secs(600);

    /// Room for so many bytes; with none, nothing is kept.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Mutex::new(Inner { limit, ..Inner::default() })))
    }

    /// Whether it can keep anything at all.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.inner().limit > 0
    }

    /// Keeps the answer to a request, in case it comes back. If there is no room it is lost.
    pub fn put(&self, partition: &Partition, offset: i64, print: Print, answer: Answer) {
        let mut inner = self.inner();
        if inner.limit == 0 {
            return inner.lose(answer.calls);
        }
        if inner.bytes + answer.size() > inner.limit {
            inner.expire(answer.since);
        }
        if inner.bytes + answer.size() > inner.limit {
            return inner.lose(answer.calls);
        }
        inner.bytes += answer.size();
        let answers = inner.answers.entry(partition.clone()).or_default();
        if let Some((_, older)) = answers.insert(offset, (print, answer)) {
            inner.bytes -= older.size();
            inner.lose(older.calls);
        }
    }

    /// Takes the answer to a request that has come back.
    #[must_use]
    pub fn take(&self, partition: &Partition, offset: i64, print: Print, now: Instant) -> Option<Answer> {
        let mut inner = self.inner();
        let (of, answer) = inner.remove(partition, offset)?;
        let is_its = of == print && now.saturating_duration_since(answer.since) < Self::FOR;
        if !is_its {
            inner.lose(answer.calls);
        }
        is_its.then_some(answer)
    }

    /// The request is done: by a transaction whose fate was unknown, or by another worker.
    pub fn forget(&self, partition: &Partition, offset: i64) {
        self.inner().remove(partition, offset);
    }

    /// Counts calls whose answers are lost and that have to be repeated.
    pub fn lose(&self, calls: u32) {
        self.inner().lose(calls);
    }

    /// How many calls have to be made again, or were, since the process began.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.inner().lost
    }

    /// The same since this was asked last.
    #[must_use]
    pub fn newly_lost(&self) -> u64 {
        let mut inner = self.inner();
        let lost = inner.lost;
        lost - std::mem::replace(&mut inner.told, lost)
    }

    /// How many answers wait for their request to come back.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inner().answers.values().map(BTreeMap::len).sum()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Nothing is left half done under the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn remove(&mut self, partition: &Partition, offset: i64) -> Option<(Print, Answer)> {
        let answers = self.answers.get_mut(partition)?;
        let (print, answer) = answers.remove(&offset)?;
        if answers.is_empty() {
            self.answers.remove(partition);
        }
        self.bytes -= answer.size();
        Some((print, answer))
    }

    /// Drops answers kept for too long: another worker has called for their requests by now.
    fn expire(&mut self, now: Instant) {
        let is_old = |answer: &Answer| now.saturating_duration_since(answer.since) >= Kept::FOR;
        let mut lost = 0;
        for answers in self.answers.values_mut() {
            answers.retain(|_, (_, answer)| {
                if is_old(answer) {
                    self.bytes -= answer.size();
                    lost += answer.calls;
                }
                !is_old(answer)
            });
        }
        self.answers.retain(|_, answers| !answers.is_empty());
        self.lose(lost);
    }

    fn lose(&mut self, calls: u32) {
        self.lost += u64::from(calls);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::runtime::clock::Timestamp;

    fn partition() -> Partition {
        Partition { topic: "requests".into(), number: 0 }
    }

    fn record(time: i64, id: &'static str) -> Record {
        let headers = vec![(crate::message::envelope::name("ce_id"), Bytes::from_static(id.as_bytes()))];
        let time = Timestamp::from_millis(time);
        Record { offset: 0, time, key: None, value: Some(Bytes::from_static(b"1")), headers, log: None }
    }

    fn answer(bytes: usize, since: Instant) -> Answer {
        let value = Bytes::from(vec![b'x'; bytes]);
        Answer { records: vec![Outgoing { topic: "r".into(), key: None, value, headers: vec![] }], calls: 1, since }
    }

    #[test]
    fn an_answer_belongs_to_the_very_record_and_not_to_another_at_its_offset() {
        let (kept, now) = (Kept::new(1_000), Instant::now());
        let print = Print::of(&record(1, "a"));
        assert_eq!(print, Print::of(&record(1, "a")));
        let elsewhere = Record { log: Some("another".into()), ..record(1, "a") };
        for other in [record(2, "a"), record(1, "b"), elsewhere] {
            kept.put(&partition(), 7, print, answer(10, now));
            assert_eq!(kept.take(&partition(), 7, Print::of(&other), now), None, "the topic was made anew");
        }
        assert_eq!((kept.lost(), kept.len()), (3, 0));
        kept.put(&partition(), 7, print, answer(10, now));
        assert_eq!(kept.take(&partition(), 8, print, now), None);
        assert_eq!(kept.take(&partition(), 7, print, now), Some(answer(10, now)));
        assert_eq!((kept.take(&partition(), 7, print, now), kept.lost()), (None, 3));
    }

    #[test]
    fn what_finds_no_room_or_grows_old_is_lost_and_counted() {
        let (kept, now) = (Kept::new(1_000), Instant::now());
        let print = Print::of(&record(1, "a"));
        for offset in 0..20 {
            kept.put(&partition(), offset, print, answer(100, now));
        }
        assert_eq!((kept.len(), kept.lost()), (10, 10));
        let later = now + Kept::FOR;
        kept.put(&partition(), 30, print, answer(1_000, later));
        assert_eq!((kept.len(), kept.lost()), (1, 20), "what nobody came back for makes room");
        kept.forget(&partition(), 30);
        assert_eq!((kept.len(), kept.lost()), (0, 20), "what is done is not lost");
        kept.put(&partition(), 1, print, answer(1_000, now));
        assert_eq!((kept.take(&partition(), 1, print, later), kept.lost()), (None, 21));
    }
}

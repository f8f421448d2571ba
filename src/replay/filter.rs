//! The filter of a replay: which records of its range are selected. Pure.

use std::collections::BTreeSet;

use crate::{
    message::{BatchId, Class, ItemId, Reason, Request, SourceName},
    store::row::Parsed,
};

/// What a record has to be; what is not said does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only of this source.
    pub source: Option<SourceName>,
    /// Only of this batch.
    pub batch: Option<BatchId>,
    /// A failure of this class, or a dead letter whose last call failed so.
    pub class: Option<Class>,
    /// A dead letter of this reason.
    pub reason: Option<Reason>,
    /// About one of these items; empty: about any.
    pub items: BTreeSet<ItemId>,
}

impl Filter {
    /// Whether every record passes: then none needs to be looked at.
    #[must_use]
    pub fn is_open(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a record is meant. One that cannot be read has no batch, class or item to be meant by.
    #[must_use]
    pub fn keeps(&self, parsed: &Parsed) -> bool {
        match parsed {
            Parsed::Request(received) => {
                self.keeps_request(received.request.source.as_ref(), &received.request) && self.has_no_end()
            }
            Parsed::Result(seen) => {
                self.is_of(Some(&seen.source), seen.batch.as_ref(), Some(&seen.item)) && self.has_no_end()
            }
            Parsed::Change(change) => {
                self.is_of(Some(&change.source), change.batch.as_ref(), Some(&change.item)) && self.has_no_end()
            }
            Parsed::Failure(failure) => {
                self.keeps_request(Some(&failure.source), &failure.request)
                    && self.class.is_none_or(|class| class == failure.attempt.class)
                    && self.reason.is_none()
            }
            Parsed::DeadLetter(dead) => {
                let request = dead.request.as_ref();
                let class = request.and_then(|request| request.history.last()).map(|attempt| attempt.class);
                let batch = request.and_then(|request| request.batch.as_ref());
                self.is_of(Some(&dead.source), batch, request.map(|request| &request.item))
                    && self.class.is_none_or(|wanted| class == Some(wanted))
                    && self.reason.is_none_or(|reason| reason == dead.reason)
            }
            Parsed::Raw(_) | Parsed::Poison(_) | Parsed::Skipped(_) => self.is_open(),
        }
    }

    /// Requests and results have neither class nor reason.
    fn has_no_end(&self) -> bool {
        self.class.is_none() && self.reason.is_none()
    }

    fn keeps_request(&self, source: Option<&SourceName>, request: &Request) -> bool {
        self.is_of(source, request.batch.as_ref(), Some(&request.item))
    }

    fn is_of(&self, source: Option<&SourceName>, batch: Option<&BatchId>, item: Option<&ItemId>) -> bool {
        (self.source.is_none() || self.source.as_ref() == source)
            && (self.batch.is_none() || self.batch.as_ref() == batch)
            && (self.items.is_empty() || item.is_some_and(|item| self.items.contains(item)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        message::{
            Attempt, DeadLetter, Failure, Lane, Origin, RequestId,
            codec::{Received, Unreadable},
        },
        runtime::clock::Timestamp,
    };

    fn request() -> Request {
        let mut request = Request::new(ItemId::new("1").unwrap());
        request.source = Some(SourceName::new("ali1688").unwrap());
        request.batch = Some(BatchId::new("monday").unwrap());
        request
    }

    fn id() -> RequestId {
        RequestId::new("r").unwrap()
    }

    fn attempt() -> Attempt {
        Attempt {
            at: Timestamp::default(),
            account: None,
            class: Class::Outage,
            code: String::new(),
            message: String::new(),
            http_status: None,
            latency_ms: 1,
            not_before: None,
        }
    }

    fn records() -> [Parsed; 4] {
        let source = SourceName::new("ali1688").unwrap();
        let mut tried = request();
        tried.history.push(attempt());
        let dead = DeadLetter {
            request_id: id(),
            source: source.clone(),
            reason: Reason::Exhausted,
            message: String::new(),
            died_at: Timestamp::default(),
            origin: Origin { topic: String::new(), partition: 0, offset: 0 },
            request: Some(tried),
            original_base64: None,
        };
        [
            Parsed::Request(Box::new(Received { id: id(), request: request() })),
            Parsed::Failure(Box::new(Failure {
                request_id: id(),
                source,
                request: request(),
                attempt: attempt(),
                lane: Lane::Bulk,
            })),
            Parsed::DeadLetter(Box::new(dead)),
            Parsed::Skipped(Unreadable::Empty),
        ]
    }

    #[test]
    fn a_record_passes_if_all_that_is_said_is_true_of_it() {
        let source = |name: &str| Filter { source: SourceName::new(name).ok(), ..Filter::default() };
        let batch = |name: &str| Filter { batch: BatchId::new(name).ok(), ..Filter::default() };
        let items = |ids: &[&str]| Filter {
            items: ids.iter().map(|id| ItemId::new(id).unwrap()).collect(),
            ..Filter::default()
        };
        let class = |class| Filter { class: Some(class), ..Filter::default() };
        let reason = |reason| Filter { reason: Some(reason), ..Filter::default() };
        // Request, failure, dead letter, unreadable.
        let table = [
            (Filter::default(), [true, true, true, true]),
            (source("ali1688"), [true, true, true, false]),
            (source("taobao"), [false; 4]),
            (batch("monday"), [true, true, true, false]),
            (batch("tuesday"), [false; 4]),
            (items(&["2", "1"]), [true, true, true, false]),
            (items(&["2"]), [false; 4]),
            (class(Class::Outage), [false, true, true, false]),
            (class(Class::Bug), [false; 4]),
            (reason(Reason::Exhausted), [false, false, true, false]),
            (reason(Reason::Expired), [false; 4]),
            (Filter { reason: Some(Reason::Exhausted), ..batch("tuesday") }, [false; 4]),
        ];
        for (filter, expected) in table {
            assert_eq!(records().each_ref().map(|record| filter.keeps(record)), expected, "{filter:?}");
        }
    }
}

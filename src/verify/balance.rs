//! The balance of each request id: requests, outcomes, and where the open ones are. Pure.
//!
//! Every record of a request that begins a chain (a retry goes on with one) asks once; a result or a dead letter ends
//! it once. A chain that has not ended stands in exactly one place that some stage has not done yet. So of each id:
//! asked = ended + under way, and what is short of that is lost.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{DefaultHasher, Hash, Hasher},
};

use crate::{message::Status, runtime::clock::Timestamp};

/// How a chain has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With an answer.
    Answered(Status),
    /// Without.
    Dead,
}

/// How many requests, each id counted once, are where. The first six add up to `requested`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Ids that were asked for.
    pub requested: u64,
    /// Whose last end is: here are the data.
    pub found: u64,
    /// There is no such item.
    pub absent: u64,
    /// Not for sale now.
    pub off_shelf: u64,
    /// Given up.
    pub dead: u64,
    /// A stage has still to do something for them.
    pub under_way: u64,
    /// Lost: neither an outcome, nor a record that a stage has still to process.
    pub lost: u64,
    /// Ended more often than asked for; counted among the ends too.
    pub doubled: u64,
}

/// What is wrong with an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// See [`Sum::lost`].
    Lost,
    /// See [`Sum::doubled`].
    Doubled,
}

/// 24 bytes in the map with its key, and room to grow: about 50 bytes an id in all.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    /// Asked minus ended.
    open: i16,
    /// Records that a stage has not done.
    waiting: u8,
    /// The number of the last end, and [`ASKED`].
    last: u8,
    /// Seconds since 1970 of the last end.
    last_at: u32,
}

/// Set where the beginning of a chain has been seen. A retry may stand before it, in another partition.
const ASKED: u8 = 0x80;

/// The ids as 128 bits each: of a billion ids two have the same with a probability of 10^-21.
type Key = [u64; 2];

/// Every id that was asked for.
#[derive(Debug, Default)]
pub struct Balance(HashMap<Key, Account>);

impl Balance {
    /// A record that begins a chain.
    pub fn ask(&mut self, id: &str) {
        let account = self.0.entry(key(id)).or_default();
        account.open = account.open.saturating_add(1);
        account.last |= ASKED;
    }

    /// A request that Kafka has not any more and that has no row of an end. One that is known otherwise stands somewhere.
    pub fn ask_if_unknown(&mut self, id: &str) {
        if let Entry::Vacant(entry) = self.0.entry(key(id)) {
            entry.insert(Account { open: 1, last: ASKED, ..Account::default() });
        }
    }

    /// A request that its stage has not done yet.
    pub fn wait(&mut self, id: &str) {
        let account = self.0.entry(key(id)).or_default();
        account.waiting = account.waiting.saturating_add(1);
    }

    /// A failure that its stage has not done yet. When outcomes are read all requests have been: an id that is not
    /// known then is of an older request, or of another batch, and ignored.
    pub fn wait_for_retry(&mut self, id: &str) {
        if let Entry::Occupied(mut entry) = self.0.entry(key(id)) {
            let account = entry.get_mut();
            account.waiting = account.waiting.saturating_add(1);
        }
    }

    /// The end of a chain; of an id that is not known as with [`Self::wait_for_retry`].
    pub fn end(&mut self, id: &str, end: End, at: Timestamp) {
        let Entry::Occupied(mut entry) = self.0.entry(key(id)) else { return };
        let account = entry.get_mut();
        account.open = account.open.saturating_sub(1);
        let at = u32::try_from(at.as_millis() / 1_000).unwrap_or(0);
        if account.last & !ASKED == 0 || at >= account.last_at {
            (account.last, account.last_at) = (account.last & ASKED | number(end), at);
        }
    }

    /// What is wrong with an id, if anything.
    #[must_use]
    pub fn fault(&self, id: &str) -> Option<Fault> {
        self.0.get(&key(id)).and_then(|account| account.fault())
    }

    /// All ids added up.
    #[must_use]
    pub fn sum(&self) -> Sum {
        let mut sum = Sum::default();
        for account in self.0.values().filter(|account| account.last & ASKED != 0) {
            sum.requested += 1;
            match account.fault() {
                Some(Fault::Lost) => {
                    sum.lost += 1;
                    continue;
                }
                Some(Fault::Doubled) => sum.doubled += 1,
                None if account.open > 0 => {
                    sum.under_way += 1;
                    continue;
                }
                None => {}
            }
            match account.last & !ASKED {
                1 => sum.found += 1,
                2 => sum.absent += 1,
                3 => sum.off_shelf += 1,
                _ => sum.dead += 1,
            }
        }
        sum
    }

    /// Leaves only the ids in which `other` finds the same fault: whatever moved while one of the two was made is
    /// found whole in the other.
    #[must_use]
    pub fn confirmed(&self, other: &Self) -> Faults {
        let both = self.0.iter().filter_map(|(key, account)| {
            let fault = account.fault()?;
            (other.0.get(key).and_then(|account| account.fault()) == Some(fault)).then_some((*key, fault))
        });
        Faults(both.collect())
    }
}

impl Account {
    fn fault(self) -> Option<Fault> {
        if self.last & ASKED == 0 {
            return None;
        }
        match self.open {
            open if open > i16::from(self.waiting) => Some(Fault::Lost),
            ..0 => Some(Fault::Doubled),
            0.. => None,
        }
    }
}

/// Ids with something wrong.
#[derive(Debug, Default)]
pub struct Faults(HashMap<Key, Fault>);

impl Faults {
    /// What is wrong with an id, told once: then it is taken out.
    pub fn take(&mut self, id: &str) -> Option<Fault> {
        self.0.remove(&key(id))
    }

    /// How many ids have this fault.
    #[must_use]
    pub fn count(&self, fault: Fault) -> u64 {
        self.0.values().filter(|found| **found == fault).count() as u64
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn number(end: End) -> u8 {
    match end {
        End::Answered(Status::Found) => 1,
        End::Answered(Status::Absent) => 2,
        End::Answered(Status::OffShelf) => 3,
        End::Dead => 4,
    }
}

fn key(id: &str) -> Key {
    [0u8, 1].map(|salt| {
        let mut hasher = DefaultHasher::new();
        (salt, id).hash(&mut hasher);
        hasher.finish()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FOUND: End = End::Answered(Status::Found);

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    #[test]
    fn a_request_that_kafka_has_deleted_unread_is_lost_unless_something_of_it_is_found() {
        let mut balance = Balance::default();
        for id in ["gone", "answered since", "waits for retry"] {
            balance.ask_if_unknown(id);
        }
        balance.ask("asked again");
        balance.wait("asked again");
        balance.ask_if_unknown("asked again");
        balance.end("answered since", End::Answered(Status::Found), Timestamp::from_millis(1));
        balance.wait_for_retry("waits for retry");
        assert_eq!(balance.fault("gone"), Some(Fault::Lost));
        let sum = balance.sum();
        assert_eq!((sum.requested, sum.lost, sum.found, sum.under_way), (4, 1, 1, 2));
    }

    #[test]
    fn each_id_is_in_one_place_and_the_places_add_up() {
        let mut balance = Balance::default();
        let ids = ["found", "absent", "off", "dead", "waiting", "failed", "lost", "doubled"];
        for id in ids {
            balance.ask(id);
        }
        balance.end("found", FOUND, at(1));
        balance.end("absent", End::Answered(Status::Absent), at(1));
        balance.end("off", End::Answered(Status::OffShelf), at(1));
        balance.end("dead", End::Dead, at(1));
        balance.wait("waiting");
        balance.wait_for_retry("failed");
        balance.wait_for_retry("of another batch");
        balance.wait("retry of an older request");
        balance.end("doubled", FOUND, at(1));
        balance.end("doubled", FOUND, at(2));
        balance.end("of another batch", FOUND, at(1));
        let sum = balance.sum();
        let expected =
            Sum { requested: 8, found: 2, absent: 1, off_shelf: 1, dead: 1, under_way: 2, lost: 1, doubled: 1 };
        assert_eq!(sum, expected);
        assert_eq!(balance.fault("lost"), Some(Fault::Lost));
        assert_eq!(balance.fault("doubled"), Some(Fault::Doubled));
        assert_eq!(balance.fault("waiting"), None);
    }

    #[test]
    fn a_dead_letter_that_was_redriven_is_what_its_last_chain_came_to() {
        let mut balance = Balance::default();
        for id in ["under way", "found", "dead again", "lost"] {
            balance.ask(id);
            balance.ask(id);
        }
        // Results are read before dead letters: the times decide.
        balance.end("found", FOUND, at(20));
        for id in ["under way", "found", "dead again", "lost"] {
            balance.end(id, End::Dead, at(10));
        }
        balance.end("dead again", End::Dead, at(20));
        balance.wait("under way");
        let sum = balance.sum();
        assert_eq!(sum, Sum { requested: 4, found: 1, under_way: 1, dead: 1, lost: 1, ..Sum::default() });
    }

    #[test]
    fn what_moved_between_two_looks_is_no_fault() {
        let (mut first, mut second) = (Balance::default(), Balance::default());
        for balance in [&mut first, &mut second] {
            balance.ask("moving");
            balance.ask("lost");
        }
        second.end("moving", FOUND, at(1));
        let mut faults = second.confirmed(&first);
        assert_eq!((faults.count(Fault::Lost), faults.count(Fault::Doubled)), (1, 0));
        assert_eq!((faults.take("moving"), faults.take("lost")), (None, Some(Fault::Lost)));
        assert!(faults.is_empty());
    }

    proptest! {
        #[test]
        fn the_places_always_add_up_to_what_was_requested(
            events in prop::collection::vec((0u8..12, 0u8..6), 0..300),
        ) {
            let mut balance = Balance::default();
            for (id, event) in events {
                let id = id.to_string();
                match event {
                    0 | 1 => balance.ask(&id),
                    2 => balance.wait(&id),
                    3 => balance.end(&id, End::Dead, at(1)),
                    4 => balance.end(&id, FOUND, at(2)),
                    _ => balance.end(&id, End::Answered(Status::Absent), at(3)),
                }
            }
            let sum = balance.sum();
            let places = sum.found + sum.absent + sum.off_shelf + sum.dead + sum.under_way + sum.lost;
            prop_assert_eq!(places, sum.requested);
        }
    }
}

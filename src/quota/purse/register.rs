//! The ledger of batches' budgets that grants: the same steps as `purse.lua`, for one process. Pure.
//!
//! What is granted never adds up to more than the budget. A state that was made anew, or that may be older than the
//! last grants, grants nothing until everybody who knows something has had the time to tell it.

use std::collections::{HashMap, hash_map::Entry};

use serde::{Serialize, Serializer, ser::SerializeSeq as _};

use super::ledger::{BATCHES, Part, Word};
use crate::{message::BatchId, quota::limit::Micros};

/// For so long a new state only listens.
pub const TELL: Micros = 5_000_000;
/// What somebody holds that was not heard of for so long counts as spent: nobody waits for it to come back.
pub const LAPSE: Micros = 60_000_000;
/// A block is at most a quarter of what is left, so that nobody holds much that others may want; but not less than so
/// many calls, so that its end does not cost an operation for each.
const LEAST: u64 = 8;

/// What a holder wants to have and to keep of a batch's budget.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ask {
    /// Of which batch.
    pub batch: BatchId,
    /// Who asks.
    pub holder: String,
    /// What the whole budget pays for.
    pub allowed: u64,
    /// What it holds in any case: it may be spending it at this moment.
    pub keep: u64,
    /// What it has spent.
    pub calls: u64,
    /// How many more calls than it has spent it would like to make.
    pub want: u64,
    /// The number of its word.
    pub seq: u64,
}

/// What somebody says to the ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Input {
    /// Somebody has looked: nobody has ever called, so that a state made anew is no lost one.
    pub read: bool,
    /// Everything that is known is wanted.
    pub all: bool,
    /// What is known.
    #[serde(serialize_with = "flat")]
    pub told: Vec<Word>,
    /// What is wanted.
    pub asks: Vec<Ask>,
}

fn flat<S: Serializer>(words: &[Word], serializer: S) -> Result<S::Ok, S::Error> {
    let mut list = serializer.serialize_seq(Some(words.len()))?;
    for (batch, holder, Part { granted, calls, seq }) in words {
        list.serialize_element(&(batch, holder, granted, calls, seq))?;
    }
    list.end()
}

/// What is answered to an ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Of which batch.
    pub batch: BatchId,
    /// The number of the holder's word that counts.
    pub seq: u64,
    /// How many calls it may make in all.
    pub granted: u64,
    /// Nothing of the budget is left, and nothing will come back.
    pub is_spent: bool,
    /// What all holders have spent, as far as they have said so.
    pub calls: u64,
}

/// What is answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// When the state was made.
    pub birth: String,
    /// To each ask.
    pub answers: Vec<Answer>,
    /// Everything that is known, if that was wanted.
    pub all: Vec<Word>,
}

/// What everybody is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A state of this birth was made.
    Born(String),
    /// A holder's new part.
    Word(Word),
}

/// The ledger itself.
#[derive(Clone, Debug, Default)]
pub struct Register {
    made: Option<Made>,
    batches: HashMap<BatchId, HashMap<String, Held>>,
}

#[derive(Clone, Debug)]
struct Made {
    run: String,
    birth: String,
    /// It grants from then on.
    opens_at: Micros,
}

#[derive(Clone, Copy, Debug, Default)]
struct Held {
    part: Part,
    heard_at: Micros,
}

impl Register {
    /// Takes what somebody says at `now`, in the server's run `run`; the answer, and what everybody is to hear.
    pub fn serve(&mut self, now: Micros, run: &str, input: &Input) -> (Output, Vec<News>) {
        let mut news = Vec::new();
        let (birth, is_open) = self.open(now, run, input.read, &mut news);
        for (batch, holder, part) in &input.told {
            match self.batches.entry(batch.clone()).or_default().entry(holder.clone()) {
                Entry::Vacant(new) => {
                    new.insert(Held { part: *part, heard_at: now });
                }
                Entry::Occupied(mut known) => known.get_mut().part = known.get().part.newer(*part),
            }
        }
        let answers = input.asks.iter().map(|ask| self.answer(now, is_open, ask, &mut news)).collect();
        self.forget();
        let all = if input.all { self.words() } else { Vec::new() };
        (Output { birth, answers, all }, news)
    }

    fn open(&mut self, now: Micros, run: &str, read: bool, news: &mut Vec<News>) -> (String, bool) {
        let is_new = self.made.is_none();
        let made = self.made.take().filter(|made| made.run == run).unwrap_or_else(|| {
            let birth = now.to_string();
            news.push(News::Born(birth.clone()));
            Made { run: run.to_owned(), birth, opens_at: if is_new && read { now } else { now + TELL } }
        });
        let made = self.made.insert(made);
        (made.birth.clone(), now >= made.opens_at)
    }

    fn answer(&mut self, now: Micros, is_open: bool, ask: &Ask, news: &mut Vec<News>) -> Answer {
        let parts = self.batches.entry(ask.batch.clone()).or_default();
        let (mut held, mut made, mut gone) = (0, 0, 0);
        for other in parts.iter().filter(|(holder, _)| **holder != ask.holder).map(|(_, other)| other) {
            held += other.part.granted;
            made += other.part.calls;
            gone += if other.heard_at + LAPSE < now { other.part.granted } else { other.part.calls };
        }
        let own = parts.entry(ask.holder.clone()).or_default();
        own.heard_at = now;
        // A word that was overtaken by a later one changes nothing.
        if ask.seq > own.part.seq {
            let room = ask.allowed.saturating_sub(held).saturating_sub(ask.calls);
            let block = ask.want.min(room).min(LEAST.max(room.div_ceil(4)));
            let granted = if is_open { ask.keep.max(ask.calls + block) } else { ask.keep };
            let before = std::mem::replace(&mut own.part, Part { granted, calls: ask.calls, seq: ask.seq });
            if (before.granted, before.calls) != (granted, ask.calls) {
                news.push(News::Word((ask.batch.clone(), ask.holder.clone(), own.part)));
            }
        }
        let own = own.part;
        let is_spent = is_open && own.calls + gone >= ask.allowed;
        Answer { batch: ask.batch.clone(), seq: own.seq, granted: own.granted, is_spent, calls: own.calls + made }
    }

    fn forget(&mut self) {
        while self.batches.len() > BATCHES {
            let heard_at = |parts: &HashMap<String, Held>| parts.values().map(|held| held.heard_at).max();
            let oldest = self.batches.iter().min_by_key(|(_, parts)| heard_at(parts)).map(|(batch, _)| batch.clone());
            oldest.and_then(|oldest| self.batches.remove(&oldest));
        }
    }

    fn words(&self) -> Vec<Word> {
        let of = |(batch, parts): (&BatchId, &HashMap<String, Held>)| -> Vec<Word> {
            parts.iter().map(|(holder, held)| (batch.clone(), holder.clone(), held.part)).collect()
        };
        self.batches.iter().flat_map(of).collect()
    }
}

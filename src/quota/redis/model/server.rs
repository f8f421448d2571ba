//! What `lease.lua` does with slots that are leased, come back and are passed on.

use super::super::{
    local::Slots,
    wire::{Ask, ExpressAsk, PassAsk, Word},
};
use crate::quota::{
    limit::Micros,
    plan::Plan,
    timetable::{Granted, Timetable},
};

/// As the script has it.
const NEAR: Micros = 20_000;

/// What a worker hears.
pub enum Delivery {
    Reply { slots: Slots, next_at: Option<Micros>, sent: Micros, shown: Micros },
    Word(Word),
}

/// A worker's slots without long gaps.
struct Run {
    first: Micros,
    last: Micros,
    count: usize,
    worker: usize,
}

/// Redis.
pub struct Server {
    table: Timetable,
    /// A longer gap ends a run.
    gap: Micros,
    runs: Vec<Run>,
    passes: bool,
}

impl Server {
    pub fn new(plan: &Plan, passes: bool) -> Self {
        let interval = crate::quota::plan::interval(plan.accounts.iter().map(|account| account.rules.spacing));
        let gap = (4 * interval.max(plan.source.spacing)).max(20_000);
        Self { table: Timetable::new(plan, super::START), gap, runs: Vec::new(), passes }
    }

    /// One call of the script: who is told what.
    pub fn lease(&mut self, worker: usize, ask: &Ask, (sent, now): (Micros, Micros)) -> Vec<(usize, Delivery)> {
        for slot in ask.returned.chunks(3) {
            let account = account_of(slot[1].as_str().unwrap());
            self.table.give_back([(account, slot[0].as_u64().unwrap())]);
        }
        let mut told = Vec::new();
        for slot in ask.passed.chunks(4) {
            let [at, name, address, to] = slot else { panic!("four of each: {slot:?}") };
            let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
            let slots = vec![(text(name), at.to_string(), text(address))];
            told.push((text(to).parse().unwrap(), Delivery::Word(Word::Passed { slots })));
        }
        let granted = (ask.count > 0).then(|| self.table.lease(ask.count, now, now + ask.ahead));
        let (granted, next_at) = match granted {
            Some(Granted::Slots(slots)) => (slots, None),
            Some(Granted::NotBefore(at)) => (Vec::new(), Some(at)),
            Some(Granted::Nobody) => panic!("nobody is disabled"),
            None => (Vec::new(), None),
        };
        self.note_runs(worker, &granted, now);
        if let Some(express) = ask.express.as_ref().filter(|_| self.passes) {
            self.hasten(worker, express, &granted, now, &mut told);
        }
        let slots = granted.into_iter().map(|(account, at)| (format!("a{account}"), at, "0".to_owned())).collect();
        told.push((worker, Delivery::Reply { slots, next_at, sent, shown: now }));
        told
    }

    fn note_runs(&mut self, worker: usize, slots: &[(usize, Micros)], now: Micros) {
        self.runs.retain(|run| run.last > now);
        for piece in slots.chunk_by(|one, next| next.1 <= one.1 + self.gap) {
            let (first, last) = (piece[0].1, piece[piece.len() - 1].1);
            self.runs.push(Run { first, last, count: piece.len(), worker });
        }
    }

    fn hasten(
        &self,
        worker: usize,
        asked: &ExpressAsk,
        granted: &[(usize, Micros)],
        now: Micros,
        told: &mut Vec<(usize, Delivery)>,
    ) {
        let from = now + asked.lead;
        let near = granted.iter().filter(|(_, at)| *at <= from + NEAR).count();
        let mut count = asked.count.saturating_sub(near);
        let mut runs: Vec<_> = self.runs.iter().filter(|run| run.last >= from).collect();
        runs.sort_by_key(|run| run.first.max(from));
        let mut ask = |run: &Run, from: Micros, calls: usize| {
            let word = PassAsk { to: worker.to_string(), count: calls, from, share: asked.share };
            told.push((run.worker, Delivery::Word(Word::Pass(word))));
        };
        let mut end = None;
        for run in runs.into_iter().filter(|run| run.worker != worker) {
            if count == 0 {
                return;
            }
            let (from, length) = (run.first.max(from), (run.last - run.first).max(1));
            let left = (run.count as f64 * (run.last - from) as f64 / length as f64).max(1.0);
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some ten")]
            let taken = count.min((left * asked.share) as usize);
            if taken > 0 {
                ask(run, from, taken);
                count -= taken;
            } else {
                end = end.or(Some((run, from)));
            }
        }
        if let Some((run, from)) = end.filter(|_| count > 0) {
            ask(run, from, 1);
        }
    }
}

fn account_of(name: &str) -> usize {
    name.strip_prefix('a').and_then(|number| number.parse().ok()).unwrap()
}

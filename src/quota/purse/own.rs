//! A process' side of batches' budgets: what it holds and spends, and what it says of that. No I/O.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Pay,
    ledger::{BATCHES, Ledger, Part},
    register::{Answer, Ask, Input, Output},
};
use crate::{
    message::{BatchId, BatchReport},
    quota::money::OnBudget,
};

/// What nobody has asked for lately goes back after so long.
const IDLE: Duration = Duration::from_secs(5);
/// How often it is said what is only counted.
const COUNTED: Duration = Duration::from_secs(1);
/// Who waits for what others hold asks again after so long.
const AGAIN: Duration = Duration::from_millis(500);
/// Who holds something says so as often; in the end it would count as spent (`register::LAPSE`).
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How many batches a report is about.
const REPORTED: usize = 256;

/// What this process holds of one batch's budget.
#[derive(Debug)]
struct Mine {
    part: Part,
    /// What was left of it when it was granted last.
    block: u64,
    is_spent: bool,
    /// Somebody waits until there is an answer.
    waits: bool,
    wanted_at: Instant,
    /// The number of the word that is on its way.
    asked: Option<u64>,
    /// Nobody knows whether the last word has arrived.
    is_unsure: bool,
    told_at: Instant,
    /// Not worth asking before.
    ask_at: Instant,
}

impl Mine {
    fn new(part: Part, now: Instant) -> Self {
        let (wanted_at, told_at, ask_at) = (now, now, now);
        Self {
            part,
            block: 0,
            is_spent: false,
            waits: false,
            wanted_at,
            asked: None,
            is_unsure: false,
            told_at,
            ask_at,
        }
    }

    fn rest(&self) -> u64 {
        self.part.granted.saturating_sub(self.part.calls)
    }

    fn is_wanted(&self, now: Instant) -> bool {
        self.waits || now < self.wanted_at + IDLE
    }

    /// Whether it is time for another block.
    fn is_short(&self) -> bool {
        !self.is_spent && self.rest() * 2 <= self.block
    }
}

/// All that this process holds.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each is something of its own to be said")]
pub struct Own {
    holder: String,
    allowed: u64,
    on_budget: OnBudget,
    /// How many calls it asks for at once.
    block: u64,
    seq: u64,
    mine: HashMap<BatchId, Mine>,
    /// Those of which something may have to be said.
    active: HashSet<BatchId>,
    /// When that is so next; `None` = as soon as something changes.
    next_at: Option<Instant>,
    /// Something has changed.
    is_due: bool,
    ledger: Ledger,
    /// Batches of which this process' part is not in there as it is.
    unnoted: HashSet<BatchId>,
    birth: String,
    /// Everything that is known is to be told, and to be asked for.
    tells: bool,
    asks_all: bool,
    /// No call leaves any more.
    is_closing: bool,
    /// Until when it holds that somebody has looked: nobody has ever called.
    read_until: Option<Instant>,
    /// Batches whose budget was found spent, and not yet said so.
    spent: Vec<BatchId>,
}

impl Own {
    pub fn new(
        holder: String,
        (allowed, on_budget): (u64, OnBudget),
        past: Ledger,
        read_until: Option<Instant>,
    ) -> Self {
        Self {
            holder,
            allowed,
            on_budget,
            block: 64,
            seq: 0,
            mine: HashMap::new(),
            active: HashSet::new(),
            next_at: None,
            is_due: true,
            tells: !past.is_empty(),
            asks_all: true,
            is_closing: false,
            ledger: past,
            unnoted: HashSet::new(),
            birth: String::new(),
            read_until,
            spent: Vec::new(),
        }
    }

    fn stops(&self) -> bool {
        self.on_budget == OnBudget::Stop
    }

    fn mine(&mut self, batch: &BatchId, now: Instant) -> &mut Mine {
        if !self.mine.contains_key(batch) {
            self.forget();
            let part = self.ledger.part(batch, &self.holder);
            self.mine.insert(batch.clone(), Mine::new(part, now));
        }
        // It is there: this is how one borrows once.
        self.mine.entry(batch.clone()).or_insert_with(|| Mine::new(Part::default(), now))
    }

    /// Makes room for another batch: whatever is said of the old one later begins where this ended.
    fn forget(&mut self) {
        while self.mine.len() >= BATCHES {
            let idle = self.mine.iter().filter(|(batch, _)| !self.active.contains(*batch));
            let Some(oldest) = idle.min_by_key(|(_, mine)| mine.wanted_at).map(|(batch, _)| batch.clone()) else {
                return;
            };
            if let Some(gone) = self.mine.remove(&oldest) {
                self.ledger.learn(&oldest, &self.holder, gone.part);
            }
        }
    }

    /// Whether a call for this batch can be paid for, as far as is known. Of a batch that is new here a first block is
    /// asked for, so that it is there when the call is to leave.
    pub fn expect(&mut self, batch: &BatchId, now: Instant) -> Pay {
        if !self.stops() {
            return Pay::Go;
        }
        if !self.mine.contains_key(batch) {
            self.mine(batch, now);
            self.wake(batch);
        }
        if self.mine(batch, now).is_spent { Pay::Spent } else { Pay::Go }
    }

    /// Pays for one call, if it can be paid for.
    pub fn charge(&mut self, batch: &BatchId, now: Instant) -> Pay {
        let stops = self.stops();
        let mine = self.mine(batch, now);
        mine.wanted_at = now;
        if stops && mine.rest() == 0 {
            if mine.is_spent {
                return Pay::Spent;
            }
            mine.waits = true;
            self.wake(batch);
            return Pay::Wait;
        }
        mine.part.calls += 1;
        mine.part.granted = mine.part.granted.max(mine.part.calls);
        if mine.rest() == 0 {
            // That it is all spent is worth saying: perhaps it was the last.
            mine.ask_at = now;
        }
        if !stops || mine.is_short() {
            self.wake(batch);
        }
        self.unnoted.insert(batch.clone());
        Pay::Go
    }

    /// A call that was paid for did not leave.
    pub fn refund(&mut self, batch: &BatchId, now: Instant) {
        let mine = self.mine(batch, now);
        mine.part.calls = mine.part.calls.saturating_sub(1);
        self.unnoted.insert(batch.clone());
        self.wake(batch);
    }

    /// There may be something to say of it.
    fn wake(&mut self, batch: &BatchId) {
        let is_short = |mine: &Mine| mine.asked.is_none() && mine.is_short();
        let is_short = self.stops() && self.mine.get(batch).is_some_and(is_short);
        self.is_due |= self.active.insert(batch.clone()) || is_short;
    }

    /// Whether there may be something to say.
    pub fn is_due(&self, now: Instant) -> bool {
        self.is_due || self.next_at.is_some_and(|at| at <= now)
    }

    /// When there may be something to say next, if nothing changes.
    pub const fn next_at(&self) -> Option<Instant> {
        self.next_at
    }

    /// What there is to be said.
    pub fn say(&mut self, now: Instant) -> Option<Input> {
        if !self.is_due(now) {
            return None;
        }
        (self.is_due, self.next_at) = (false, None);
        let (mut asks, mut quiet) = (Vec::new(), Vec::new());
        for batch in &self.active {
            let Some(mine) = self.mine.get_mut(batch) else { continue };
            if mine.asked.is_some() {
                continue;
            }
            if self.is_closing {
                mine.wanted_at = mine.wanted_at.min(now.checked_sub(IDLE).unwrap_or(now));
            }
            match next(mine, self.on_budget, now) {
                Next::Say(want) => {
                    self.seq += 1;
                    (mine.asked, mine.told_at) = (Some(self.seq), now);
                    let want = if want { self.block } else { 0 };
                    let Part { granted: keep, calls, .. } = mine.part;
                    let (batch, holder) = (batch.clone(), self.holder.clone());
                    asks.push(Ask { batch, holder, allowed: self.allowed, keep, calls, want, seq: self.seq });
                }
                Next::At(at) => self.next_at = Some(self.next_at.map_or(at, |next| next.min(at))),
                Next::Quiet => quiet.push(batch.clone()),
            }
        }
        for batch in quiet {
            self.active.remove(&batch);
        }
        let told = if std::mem::take(&mut self.tells) { self.known().words().collect() } else { Vec::new() };
        let all = std::mem::take(&mut self.asks_all);
        let read = self.read_until.is_some_and(|until| now < until);
        (all || !told.is_empty() || !asks.is_empty()).then_some(Input { read, all, told, asks })
    }

    /// Everything that is known, what this process holds among it.
    fn known(&mut self) -> &Ledger {
        for batch in self.unnoted.drain() {
            if let Some(mine) = self.mine.get(&batch) {
                self.ledger.learn(&batch, &self.holder, mine.part);
            }
        }
        &self.ledger
    }

    /// Those batches that were called for last.
    pub fn reports(&mut self) -> Vec<BatchReport> {
        let allowed = self.allowed;
        self.known().reports(REPORTED, allowed)
    }

    /// What was answered; whether anybody may have waited for it, or has to hear of it.
    pub fn take(&mut self, output: Output, now: Instant) -> bool {
        // Of later states nobody can say that nobody has called before them.
        self.read_until = None;
        if output.birth != self.birth {
            // A state that knows nothing of what this process knows.
            (self.tells, self.is_due) = (!self.birth.is_empty() || self.tells, true);
            self.birth = output.birth;
        }
        for (batch, holder, part) in &output.all {
            if *holder != self.holder {
                self.ledger.learn(batch, holder, *part);
            }
        }
        let mut has_changed = false;
        for answer in &output.answers {
            has_changed |= self.answered(answer, now);
        }
        has_changed
    }

    fn answered(&mut self, answer: &Answer, now: Instant) -> bool {
        let (stops, allowed) = (self.stops(), self.allowed);
        let Some(mine) = self.mine.get_mut(&answer.batch).filter(|mine| mine.asked == Some(answer.seq)) else {
            return false;
        };
        (mine.asked, mine.is_unsure) = (None, false);
        mine.part.seq = answer.seq;
        let more = answer.granted.saturating_sub(mine.part.granted);
        mine.part.granted = mine.part.granted.max(answer.granted);
        mine.block = mine.rest();
        mine.ask_at = if more == 0 { now + AGAIN } else { now };
        let is_spent = if stops { answer.is_spent && mine.rest() == 0 } else { answer.calls >= allowed };
        let is_news = is_spent && !std::mem::replace(&mut mine.is_spent, true);
        if is_news {
            self.spent.push(answer.batch.clone());
        }
        let is_answered = mine.waits && (mine.rest() > 0 || mine.is_spent);
        if is_answered {
            // Who has waited for long wants it now.
            (mine.waits, mine.wanted_at) = (false, now);
        }
        self.unnoted.insert(answer.batch.clone());
        self.is_due = true;
        is_answered || is_news
    }

    /// Batches whose budget was found spent since this was asked last.
    pub fn newly_spent(&mut self) -> Vec<BatchId> {
        std::mem::take(&mut self.spent)
    }

    /// The connection is lost: nobody knows what became of the words on their way. What it missed is asked for.
    pub fn lost(&mut self) {
        for (batch, mine) in self.mine.iter_mut().filter(|(_, mine)| mine.asked.is_some()) {
            (mine.asked, mine.is_unsure) = (None, true);
            self.active.insert(batch.clone());
        }
        (self.tells, self.asks_all, self.is_due) = (true, true, true);
    }

    /// What another process holds now.
    pub fn heard(&mut self, batch: &BatchId, holder: &str, part: Part, now: Instant) {
        let before = self.ledger.part(batch, holder);
        if holder == self.holder || !self.ledger.learn(batch, holder, part) || part.granted >= before.granted {
            return;
        }
        // It has given something back.
        if let Some(mine) = self.mine.get_mut(batch).filter(|mine| mine.waits) {
            (mine.ask_at, self.is_due) = (now, true);
        }
    }

    /// What others report.
    pub fn read(&mut self, reports: &[BatchReport]) {
        self.ledger.read(reports);
    }

    /// A state was made: it is to be told what this process knows.
    pub fn born(&mut self, birth: &str) {
        if birth != self.birth && !self.birth.is_empty() {
            (self.tells, self.is_due) = (true, true);
            birth.clone_into(&mut self.birth);
        }
    }

    /// No call leaves any more: what is left goes back.
    pub fn close(&mut self) {
        self.is_closing = true;
        let left = self.mine.iter_mut().filter(|(_, mine)| mine.rest() > 0 || mine.waits);
        for (batch, mine) in left {
            mine.waits = false;
            self.active.insert(batch.clone());
        }
        self.is_due = true;
    }

    /// Whether everything has been said, and answered.
    pub fn is_settled(&self) -> bool {
        let is_open = |mine: &Mine| mine.asked.is_some() || mine.is_unsure || mine.rest() > 0;
        !self.active.iter().filter_map(|batch| self.mine.get(batch)).any(is_open)
    }

    /// How many calls are asked for at once.
    pub fn set_block(&mut self, block: u64) {
        self.block = block.max(1);
    }
}

/// What there is to do about a batch.
enum Next {
    /// Say what is held, and whether more is wanted.
    Say(bool),
    /// Nothing before this time.
    At(Instant),
    /// Nothing until somebody wants to call for it.
    Quiet,
}

fn next(mine: &mut Mine, on_budget: OnBudget, now: Instant) -> Next {
    if mine.is_unsure {
        return Next::Say(on_budget == OnBudget::Stop && mine.is_wanted(now));
    }
    if on_budget == OnBudget::Warn {
        // Nothing is granted: it is only counted.
        let at = mine.told_at + COUNTED;
        return if mine.wanted_at < mine.told_at {
            Next::Quiet
        } else if at <= now {
            Next::Say(false)
        } else {
            Next::At(at)
        };
    }
    if mine.is_wanted(now) {
        let beat_at = mine.told_at + HEARTBEAT;
        return match mine.is_short() {
            true if mine.ask_at <= now => Next::Say(true),
            true => Next::At(mine.ask_at),
            false if mine.is_spent && mine.rest() == 0 => Next::Quiet,
            false if beat_at <= now => Next::Say(true),
            false => Next::At(beat_at.min(mine.wanted_at + IDLE)),
        };
    }
    if mine.rest() == 0 {
        return Next::Quiet;
    }
    mine.part.granted = mine.part.calls;
    Next::Say(false)
}

//! The state of one partition in the sink: cut a block, commit the intent, insert, advance. Pure: time is an argument.
//!
//! What is committed always follows from the state here ([`Lane::wanted`]), and an insert begins only for a block
//! that stands in an acknowledged commit. So whoever reads the commit knows every block that may be in the table.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    block::{Block, Blocks, Cut, Limits},
    doubt::Doubt,
    guard::Guard,
    intent::{self, AHEAD, Intent, IntentError},
    sealed::{Reading, Sealed},
    settle::{End, Halt},
};
use crate::{
    kafka::{Assignment, Committed, Epoch, Handover, Outgoing, Partition, Record},
    runtime::backoff::Backoff,
    store::Route,
};

/// An insert begins within this time after its block was announced; later it is announced again, which fails if the
/// partition has gone. So nobody inserts on the strength of an intent that a new owner has dealt with long ago.
pub const FRESH_FOR: Duration = Duration::from_secs(30);

/// Inserts at once. Each makes a part in ClickHouse, so more would only make more to merge.
pub const INSERTS_MAX: usize = 4;

/// For each insert under way a block that is old but not full waits so many-th of the age more: with three of them a
/// second becomes 1.75.
const GIVE_WAY: u32 = 4;

const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const PAUSES: Backoff = Backoff::new(Duration::from_secs(1), LONGEST_PAUSE);

/// A partition that is ours, or was until a moment ago.
pub struct Lane {
    pub epoch: Epoch,
    pub route: Arc<Route>,
    /// Set while it is about to go to another member: nothing begins any more.
    pub leaving: Option<Arc<Handover>>,
    pub is_paused: bool,
    blocks: Blocks,
    reading: Option<usize>,
    pending: VecDeque<Pending>,
    /// Announced by a predecessor, and not yet in `pending`.
    inherited: VecDeque<Intent>,
    /// Everything before it is stored; `None` as long as nothing was ever committed or stored.
    done: Option<i64>,
    /// What the group has.
    committed: Option<Committed>,
    /// Whether rows of what follows may be there.
    guard: Guard,
    /// When the table is asked about a block again that it could not be asked about.
    look_again_at: Option<Instant>,
    look_pause: Backoff,
}

/// A block on its way.
struct Pending {
    intent: Intent,
    /// `None` while an insert is under way.
    sealed: Option<Sealed>,
    doubt: Doubt,
    letters: Vec<Outgoing>,
    /// Its dead letters are written: the commit has to say so, or the next owner would write them again.
    is_written: bool,
    came_at: Instant,
    bytes: usize,
    /// When the commit that announces it was sent, at the latest, as uptime.
    announced_at: Option<Duration>,
    again_at: Option<Instant>,
    pause: Backoff,
    split: bool,
    halt: Option<Halt>,
}

/// An insert that may begin.
pub struct Job {
    pub sealed: Sealed,
    pub doubt: Doubt,
    pub announced_at: Duration,
    pub split: bool,
}

impl Pending {
    fn new(reading: Reading, doubt: Doubt, came_at: Instant) -> Self {
        let Reading { sealed, letters, .. } = reading;
        Self {
            intent: sealed.intent.clone(),
            bytes: sealed.bytes,
            sealed: Some(sealed),
            doubt,
            letters,
            is_written: false,
            came_at,
            announced_at: None,
            again_at: None,
            pause: PAUSES,
            split: false,
            halt: None,
        }
    }

    fn is_in_flight(&self) -> bool {
        self.sealed.is_none()
    }

    /// Whether nothing of it can be anywhere, so that it need not be in the commit.
    fn is_untouched(&self) -> bool {
        !self.is_in_flight() && !self.is_written && self.doubt.is_untouched()
    }
}

impl Lane {
    /// The lane of a new assignment, continued from what the group has committed.
    ///
    /// # Errors
    /// [`IntentError`] if the commit's metadata is not ours to read.
    pub fn new(assignment: Assignment, route: Arc<Route>, limits: Limits) -> Result<Self, IntentError> {
        let Assignment { partition, epoch, committed, log } = assignment;
        // Whatever is stored, counted and recognised is named by the log.
        let partition = Partition { topic: log.unwrap_or(partition.topic), number: partition.number };
        let (guard, intents) = match &committed {
            Some(committed) => intent::decode(committed.offset, &committed.metadata)?,
            None => (Guard::Unknown, Vec::new()),
        };
        Ok(Self {
            blocks: Blocks::new(partition, limits, intents.clone()),
            epoch,
            route,
            leaving: None,
            is_paused: false,
            reading: None,
            pending: VecDeque::new(),
            inherited: intents.into(),
            done: committed.as_ref().map(|committed| committed.offset),
            committed,
            guard,
            look_again_at: None,
            look_pause: PAUSES,
        })
    }

    pub fn limit(&mut self, limits: Limits) {
        self.blocks.limit(limits);
    }

    pub fn push(&mut self, records: Vec<Record>, now: Instant) {
        for record in records {
            self.blocks.push(record, now);
        }
    }

    pub fn gone(&mut self, until: i64, now: Instant) {
        self.blocks.gone(until, now);
    }

    pub fn seal(&mut self) {
        self.blocks.seal();
    }

    /// In bytes of memory, about.
    pub fn bytes(&self) -> usize {
        let pending: usize = self.pending.iter().map(|pending| pending.bytes).sum();
        self.blocks.bytes() + self.reading.unwrap_or(0) + pending
    }

    /// Whether it can only go on by reading on: it was announced what is to be cut, perhaps when there was more memory.
    pub fn needs_records(&self) -> bool {
        self.pending.is_empty() && self.reading.is_none() && self.blocks.lacks_records()
    }

    /// When the next block may be cut, beside so many inserts that are under way or about to begin.
    ///
    /// A full block is cut ahead of its insert. One that is only old grows until its insert can begin: cut before, it
    /// would wait, and so would the records behind it, which could have come with it. And it gives way for a while to
    /// each insert under way: one after the other they are sooner done than all at once, and fewer.
    fn cut_at(&self, inserts: usize) -> Option<Instant> {
        let is_open = self.reading.is_none() && self.pending.len() < AHEAD && self.leaving.is_none();
        let due = self.blocks.due().filter(|_| is_open)?;
        let is_next = self.pending.is_empty() && inserts < INSERTS_MAX;
        let cut_at = match (self.blocks.is_full(), is_next) {
            (true, _) => due,
            (false, true) => due + self.blocks.limits().age * u32::try_from(inserts).unwrap_or(0) / GIVE_WAY,
            (false, false) => return None,
        };
        Some(self.look_again_at.map_or(cut_at, |again| cut_at.max(again)))
    }

    /// Since when the next block is full or old enough, if it is; in whose order lanes may insert.
    pub fn due_since(&self, now: Instant) -> Option<Instant> {
        self.blocks.due().filter(|due| *due <= now)
    }

    /// Whether its insert begins as soon as its block is read and announced.
    pub fn is_about_to_insert(&self, now: Instant) -> bool {
        let can_begin = |front: &Pending| !front.is_in_flight() && front.again_at.is_none_or(|again| again <= now);
        self.leaving.is_none() && self.pending.front().map_or(self.reading.is_some(), can_begin)
    }

    /// The next block to be read, and whether rows of it may be there; `inserts`: under way or about to begin.
    pub fn cut(&mut self, now: Instant, inserts: usize) -> Option<(Cut, Guard)> {
        self.cut_at(inserts).filter(|cut_at| *cut_at <= now)?;
        let cut = self.blocks.take(now)?;
        if let Cut::New(block) = &cut {
            self.guard = self.guard.from(block.first());
        }
        self.reading = Some(match &cut {
            Cut::New(block) | Cut::Rebuilt(block, _) => block.bytes,
            Cut::Lost(_) => 0,
        });
        Some((cut, self.guard))
    }

    /// The table could not be asked about the block that was cut.
    pub fn unread(&mut self, block: Block, now: Instant) {
        self.reading = None;
        self.blocks.put_back(block);
        self.look_again_at = Some(now + self.look_pause.failed());
    }

    /// The block that was cut has been read.
    pub fn read(&mut self, mut reading: Reading, came_at: Instant) {
        self.reading = None;
        (self.look_again_at, self.look_pause) = (None, PAUSES);
        self.guard = reading.guard.unwrap_or(self.guard);
        if let Some(rest) = reading.rest.take() {
            self.blocks.put_back(rest);
        }
        let is_inherited = self.inherited.front() == Some(&reading.sealed.intent);
        // Where rows are put back ClickHouse may still know the token of the block that they once came with: then it
        // acknowledges and stores nothing.
        let is_put_back = matches!(reading.guard, Some(Guard::Until(_)));
        let doubt = if is_inherited || is_put_back { Doubt::recovered() } else { Doubt::none() };
        if is_inherited {
            self.inherited.pop_front();
        }
        self.pending.push_back(Pending::new(reading, doubt, came_at));
    }

    /// How many blocks are announced: on leaving none of those at the end that nothing is known of anywhere. One in
    /// the middle stays, or its records would be passed over.
    fn kept(&self) -> usize {
        if self.leaving.is_none() {
            return self.pending.len();
        }
        self.pending.iter().rposition(|pending| !pending.is_untouched()).map_or(0, |last| last + 1)
    }

    /// What the group should have; `None` as long as there is nothing to say. And how many blocks of ours it
    /// announces.
    pub fn wanted(&self) -> Option<(Committed, usize)> {
        let ours = self.kept();
        let pending = || self.pending.iter().take(ours).map(|pending| &pending.intent);
        let first = pending().next().or(self.inherited.front());
        let offset = first.map(|intent| intent.first).or(self.done)?;
        let (metadata, count) = intent::encode(self.guard.from(offset), pending().chain(&self.inherited));
        Some((Committed { offset, metadata }, count.min(ours)))
    }

    /// What to commit now, if anything: progress, and intents that somebody waits for. Intents of blocks that could
    /// not begin anyhow travel with the next commit: so there is one commit for each block.
    pub fn due_commit(&self, now: Instant, uptime: Duration) -> Option<Committed> {
        let (wanted, _) = self.wanted()?;
        let moved = self.committed.as_ref().is_none_or(|committed| committed.offset != wanted.offset);
        let waits = self.leaving.is_none()
            && self.pending.front().is_some_and(|front| {
                let is_announced = front.announced_at.is_some_and(|at| is_fresh(at, uptime));
                !front.is_in_flight() && !is_announced && front.again_at.is_none_or(|again| again <= now)
            });
        (moved || waits).then_some(wanted)
    }

    /// Dead letters that must be written with the commit.
    pub fn letters(&self) -> impl Iterator<Item = &Outgoing> {
        let announced = if self.leaving.is_some() { 0 } else { self.wanted().map_or(0, |(_, count)| count) };
        self.pending.iter().take(announced).flat_map(|pending| &pending.letters)
    }

    /// The group has it; `sent_at`: the uptime before it was sent.
    pub fn committed(&mut self, committed: Committed, sent_at: Duration) {
        let announced = self.wanted().map_or(0, |(_, count)| count);
        self.committed = Some(committed);
        if self.leaving.is_some() {
            return;
        }
        for (index, pending) in self.pending.iter_mut().enumerate() {
            if index < announced {
                pending.announced_at = Some(sent_at);
                pending.is_written |= !pending.letters.is_empty();
                pending.letters.clear();
            } else {
                pending.announced_at = None;
            }
        }
        // Nothing to insert: done with its announcement, which carried the dead letters.
        let is_done = |front: &&Pending| front.intent.rows == 0 && front.announced_at.is_some();
        while let Some(front) = self.pending.front().filter(is_done) {
            self.done = Some(front.intent.next);
            self.pending.pop_front();
        }
    }

    /// When the first block may begin that is announced; `None` if there is none, or its insert is under way.
    pub fn ready_since(&self, now: Instant, uptime: Duration) -> Option<Instant> {
        let front = self.pending.front().filter(|front| !front.is_in_flight() && self.leaving.is_none())?;
        let is_announced = front.announced_at.is_some_and(|at| is_fresh(at, uptime));
        (is_announced && front.again_at.is_none_or(|again| again <= now)).then_some(front.came_at)
    }

    /// Takes the first block out for its insert.
    pub fn start(&mut self) -> Option<Job> {
        let front = self.pending.front_mut()?;
        let announced_at = front.announced_at?;
        Some(Job { sealed: front.sealed.take()?, doubt: front.doubt.clone(), announced_at, split: front.split })
    }

    /// The insert that [`Self::start`] began has ended.
    pub fn ended(&mut self, sealed: Sealed, doubt: Doubt, end: End, now: Instant) {
        let Some(front) = self.pending.front_mut() else { return };
        front.doubt = doubt;
        front.halt = None;
        front.again_at = None;
        match end {
            End::Stored => {
                self.done = Some(front.intent.next);
                self.pending.pop_front();
                return;
            }
            End::Stale => front.announced_at = None,
            End::Split => return self.split(sealed),
            End::Refused(trouble) => {
                front.split |= trouble.is_too_large();
                front.again_at = Some(now + front.pause.failed());
            }
            End::Halted(halt) => {
                front.halt = Some(halt);
                front.again_at = Some(now + LONGEST_PAUSE);
            }
        }
        front.sealed = Some(sealed);
    }

    /// Puts two halves in the place of the first block. Both have to be announced before they are inserted.
    fn split(&mut self, whole: Sealed) {
        let Some(front) = self.pending.pop_front() else { return };
        let halves = match whole.split() {
            Ok((left, right)) => vec![(left, Doubt::none()), (right, Doubt::none())],
            Err(whole) => vec![(*whole, front.doubt)],
        };
        for (sealed, doubt) in halves.into_iter().rev() {
            let reading = Reading { sealed, letters: Vec::new(), rest: None, guard: None };
            self.pending.push_front(Pending { pause: front.pause, ..Pending::new(reading, doubt, front.came_at) });
        }
    }

    /// Why it stands still, if it does.
    pub fn halt(&self) -> Option<(&Halt, &Sealed)> {
        let front = self.pending.front()?;
        front.halt.as_ref().zip(front.sealed.as_ref())
    }

    /// Whether an insert is under way.
    pub fn is_busy(&self) -> bool {
        self.pending.front().is_some_and(Pending::is_in_flight)
    }

    /// When something has to happen without an event. What could have begun before `now` waits for an event: the end
    /// of an insert, or of a commit.
    pub fn due(&self, now: Instant, inserts: usize) -> Option<Instant> {
        let front = self.pending.front().filter(|_| self.leaving.is_none());
        let again = front.and_then(|front| front.again_at).filter(|again| *again > now);
        again.into_iter().chain(self.cut_at(inserts)).min()
    }
}

/// Whether an insert may begin that was announced at this uptime.
pub fn is_fresh(announced_at: Duration, uptime: Duration) -> bool {
    uptime.saturating_sub(announced_at) < FRESH_FOR
}

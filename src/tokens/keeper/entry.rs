//! The token state of one account. No I/O.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{Permit, Purpose, end_of};
use crate::{
    message::AccountAlias,
    platform::{Account, Tokens},
    runtime::clock::Timestamp,
    tokens::{
        Origin, Record, Refused,
        life::{self, Kept},
    },
};

/// How an account's token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Not rejected.
    Good,
    /// Rejected by the vendor: no calls use it any more.
    Refused,
    /// Nor does the vendor renew it.
    Dead,
}

/// One account's tokens.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) configured: Arc<Account>,
    /// With the tokens of this moment.
    pub(super) account: Arc<Account>,
    /// Counts them.
    pub(super) generation: u64,
    pub(super) state: State,
    /// Why it is [`State::Dead`].
    pub(super) death: Option<Refused>,
    /// This process has a slot or a call under way for it.
    pub(super) is_renewing: bool,
    /// A claim that was won too late for its slot.
    pub(super) permit: Option<Permit>,
    /// This process has renewed it.
    pub(super) was_renewed_here: bool,
    /// A call was answered with this generation.
    pub(super) was_accepted: bool,
    /// A record that the store has not taken yet.
    pub(super) unstored: Option<Record>,
    /// The record that the tokens of this moment came from; nothing while they are the configured ones.
    held: Option<Record>,
    revision: u64,
    obtained_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    refresh_expires_at: Option<Timestamp>,
    due_at: Option<Timestamp>,
    replaces: Vec<String>,
    failures: u32,
    /// No renewal before this time.
    retry_at: Option<Instant>,
}

impl Entry {
    pub(super) fn new(account: &Account) -> Self {
        let configured = Arc::new(account.clone());
        Self {
            account: Arc::clone(&configured),
            configured,
            generation: 0,
            state: State::Good,
            death: None,
            is_renewing: false,
            permit: None,
            was_renewed_here: false,
            was_accepted: false,
            unstored: None,
            held: None,
            revision: 0,
            obtained_at: None,
            expires_at: None,
            refresh_expires_at: None,
            due_at: None,
            replaces: Vec::new(),
            failures: 0,
            retry_at: None,
        }
    }

    /// What a slot is good for. The caller of a renewal has it until [`Self::is_renewing`] is taken back.
    pub(super) fn purpose(&mut self, now: Timestamp, instant: Instant) -> Purpose {
        if self.state == State::Dead {
            return Purpose::Nothing;
        }
        let can_call = self.can_call(now);
        let retry_at = self.retry_at.filter(|at| *at > instant);
        if self.is_due(now) && !self.is_renewing && retry_at.is_none() {
            self.is_renewing = true;
            return Purpose::Renewal;
        }
        match (can_call, retry_at) {
            (true, _) => Purpose::Call,
            (false, Some(at)) => Purpose::Wait(at),
            (false, None) => Purpose::Wait(instant + Duration::from_millis(100)),
        }
    }

    /// Whether a renewal is called for, and possible.
    pub(super) fn is_due(&self, now: Timestamp) -> bool {
        let is_time = !self.can_call(now) || self.due_at.is_some_and(|at| at <= now);
        is_time && self.state != State::Dead && self.account.refresh_token.is_some()
    }

    /// Whether there is a token that a call can be made with, or none is needed. One that cannot be renewed is tried
    /// beyond its time: the vendor's refusal tells the operator.
    fn can_call(&self, now: Timestamp) -> bool {
        let lives = self.account.access_token.is_some() && self.expires_at.is_none_or(|at| now < at);
        self.state == State::Good && (lives || self.account.refresh_token.is_none())
    }

    /// A claim is taken; whether calls can go on.
    pub(super) fn await_another(&mut self, now: Timestamp, instant: Instant, wait: [Duration; 2]) -> bool {
        let can_call = self.can_call(now);
        self.retry_at = Some(instant + wait[usize::from(!can_call)]);
        can_call
    }

    /// A renewal came to nothing; how many in a row.
    pub(super) fn fail(&mut self, instant: Instant) -> u32 {
        self.failures += 1;
        self.retry_at = Some(instant + life::backoff(self.failures));
        self.failures
    }

    /// A call was refused; nothing if another one has told before, or if the token is a newer one by now.
    pub(super) fn refuse(&mut self, generation: u64) -> Option<AccountAlias> {
        if self.generation != generation || self.state != State::Good {
            return None;
        }
        self.state = State::Refused;
        Some(self.configured.alias.clone())
    }

    /// The account, and whether a renewal may help.
    pub(super) fn after_refusal(&self, now: Timestamp) -> (Arc<Account>, bool) {
        // Whoever renewed it knows that nobody called with it before; for the others it may have worked until now.
        let is_second =
            self.was_renewed_here && life::is_second_refusal(self.obtained_at, self.expires_at, self.was_accepted, now);
        (Arc::clone(&self.account), self.account.refresh_token.is_some() && !is_second)
    }

    /// The record of a renewal.
    pub(super) fn record_of(&self, account: &Account, tokens: Tokens, now: Timestamp) -> Record {
        Record {
            revision: self.revision + 1,
            access_token: Some(tokens.access_token),
            refresh_expires_at: tokens.refresh_until.or(self.refresh_expires_at),
            refresh_token: tokens.refresh_token.or_else(|| account.refresh_token.clone()),
            obtained_at: now,
            expires_at: end_of(now, tokens.lives),
            origin: Origin::Renewed,
            refused: None,
            replaces: life::replaced(&self.replaces, &self.configured),
        }
    }

    /// The record that nobody can renew the token.
    pub(super) fn record_of_death(&self, account: &Account, refused: Refused) -> Record {
        Record {
            revision: self.revision + 1,
            access_token: account.access_token.clone(),
            refresh_token: account.refresh_token.clone(),
            obtained_at: self.obtained_at.unwrap_or(refused.at),
            expires_at: self.expires_at,
            refresh_expires_at: self.refresh_expires_at,
            origin: Origin::Renewed,
            refused: Some(refused),
            replaces: life::replaced(&self.replaces, &self.configured),
        }
    }

    /// Takes a record over if it is newer; whether it was.
    pub(super) fn adopt(&mut self, record: Record, jitter: f64) -> bool {
        if record.revision <= self.revision {
            return false;
        }
        self.held = Some(record.clone());
        let is_configured = record.origin == Origin::Configured;
        self.account = Arc::new(life::with_tokens_of(&self.configured, &record));
        self.generation += 1;
        self.state = if record.refused.is_some() { State::Dead } else { State::Good };
        self.death = record.refused;
        (self.was_renewed_here, self.was_accepted) = (false, false);
        self.revision = record.revision;
        self.obtained_at = (!is_configured).then_some(record.obtained_at);
        self.expires_at = record.expires_at;
        self.refresh_expires_at = record.refresh_expires_at;
        self.due_at = record.expires_at.map(|expires_at| life::due_at(record.obtained_at, expires_at, jitter));
        self.replaces = record.replaces;
        (self.failures, self.retry_at) = (0, None);
        // A claim that was kept for the token before.
        self.permit = None;
        true
    }

    /// Takes over credentials that were corrected, with the tokens of this moment; gives back those from before.
    pub(super) fn correct(&mut self, configured: Account) -> Arc<Account> {
        let configured = Arc::new(configured);
        let tokens = (self.account.access_token.clone(), self.account.refresh_token.clone());
        self.account = match &self.held {
            Some(record) => Arc::new(life::with_tokens_of(&configured, record)),
            None => {
                Arc::new(Account { access_token: tokens.0, refresh_token: tokens.1, ..configured.as_ref().clone() })
            }
        };
        // What is refused from now on to calls that were signed before says nothing about these.
        self.generation += 1;
        std::mem::replace(&mut self.configured, configured)
    }

    /// Takes over credentials whose tokens were corrected, where nobody has renewed the ones before.
    pub(super) fn begin_anew(&mut self, configured: &Account) {
        let generation = self.generation + 1;
        *self = Self { generation, is_renewing: self.is_renewing, ..Self::new(configured) };
    }

    /// What is held here, or what was found in the store if that is newer.
    pub(super) fn newer_than(&self, found: Option<Record>) -> Option<Record> {
        let held = self.held.iter().chain(&self.unstored).cloned();
        held.chain(found).max_by_key(|record| record.revision)
    }

    /// What to do about the record that is held here, where the store, which may have lost records, has `found`. One that
    /// was made since is taken over whatever its revision.
    pub(super) fn after_loss(&mut self, found: Option<&Record>) -> Option<Record> {
        match life::after_loss(self.held.as_ref()?, found) {
            Kept::Same => None,
            Kept::Offer(record) => Some(*record),
            Kept::Adopt => {
                self.revision = 0;
                None
            }
        }
    }

    /// The tokens of this record are of this process' own renewal.
    pub(super) fn mark_renewed_here(&mut self, revision: u64) {
        self.was_renewed_here = self.revision == revision;
    }

    /// What the store has still to take.
    pub(super) fn unstored(&self) -> Option<(AccountAlias, Record)> {
        Some((self.configured.alias.clone(), self.unstored.clone()?))
    }

    /// The store has taken it.
    pub(super) fn stored(&mut self, revision: u64) {
        if self.unstored.as_ref().is_some_and(|record| record.revision <= revision) {
            self.unstored = None;
        }
    }
}

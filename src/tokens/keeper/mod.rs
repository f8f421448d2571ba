//! Keeps the tokens of one source's accounts valid: renews them before they expire, and after a rejection.
//!
//! Nothing is renewed that nobody calls with: when an account's slot comes and its token is due, that slot is spent on
//! the renewal ([`Keeper::purpose`]), under a claim that only one process of the fleet can have. The others find the
//! new token in the store, which [`Keeper::watch`] looks at every second.

mod entry;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};
use tracing::{error, info, warn};

use self::entry::{Entry, State};
use super::{
    Changes, Claim, Mark, Origin, Record, Refused, StoreError, TokenStore,
    life::{self, Choice},
};
use crate::{
    message::{AccountAlias, SourceName},
    platform::{Account, Common, Refusal, RefusalKind, Tokens},
    quota::{Cause, Hold, Quota, Scope},
    runtime::clock::{Clock, Dice, Timestamp},
};

/// How often the store is looked at.
const WATCH: Duration = Duration::from_secs(1);
/// The same while calls wait for a token that another process renews.
const HURRY: Duration = Duration::from_millis(100);
/// For how long that is worth it.
const HURRY_FOR: Duration = Duration::from_secs(30);
/// After a claim that another process has: if calls can go on meanwhile, and if not.
const TAKEN: [Duration; 2] = [Duration::from_secs(2), Duration::from_millis(300)];
/// What a claim lasts beyond the call: for storing the token.
const CLAIM_SPARE: Duration = Duration::from_secs(20);
/// How often a new token is offered to the store before the watch goes on with that.
const PUTS: u32 = 5;
/// After so many replies in a row that make no sense, the vendor will not renew the token.
const NONSENSE: u32 = 5;

/// What an account's slot is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A call.
    Call,
    /// A renewal: [`Keeper::begin`].
    Renewal,
    /// Nothing before this time: the token is of no use, and is being renewed or cannot be at the moment.
    Wait(Instant),
    /// Nothing: only a new authorisation helps.
    Nothing,
}

/// What a refusal, or a renewal, came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is a token to call with, or will be.
    Alive,
    /// The account is disabled until a user authorises the app again.
    Dead,
}

/// The right to make one renewal.
#[derive(Debug)]
pub struct Permit {
    index: usize,
    claim: Claim,
    until: Instant,
    /// With the tokens that are to be renewed.
    pub account: Arc<Account>,
}

/// See the module.
pub struct Keeper {
    source: SourceName,
    store: Arc<dyn TokenStore>,
    entries: Mutex<Vec<Entry>>,
    indices: HashMap<AccountAlias, usize>,
    /// How long one call to the vendor can take.
    call_max: Duration,
    clock: Clock,
    dice: Dice,
    mark: Mutex<Mark>,
    hurry_until: Mutex<Option<Instant>>,
    poke: Notify,
    changed: Notify,
}

impl Keeper {
    /// A keeper of these accounts' tokens, as configured until [`Keeper::load`].
    #[must_use]
    pub fn new(
        source: SourceName,
        accounts: &[Account],
        store: Arc<dyn TokenStore>,
        call_max: Duration,
        clock: Clock,
        dice: Dice,
    ) -> Self {
        Self {
            source,
            store,
            indices: accounts.iter().enumerate().map(|(index, account)| (account.alias.clone(), index)).collect(),
            entries: Mutex::new(accounts.iter().map(Entry::new).collect()),
            call_max,
            clock,
            dice,
            mark: Mutex::default(),
            hurry_until: Mutex::default(),
            poke: Notify::new(),
            changed: Notify::new(),
        }
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        // Every step leaves an entry whole, so a panic elsewhere under the lock has broken nothing.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what the store has; to be done before the first call.
    ///
    /// # Errors
    /// [`StoreError`]: calling with tokens that another process has renewed meanwhile would kill those.
    pub async fn load(&self, quota: &dyn Quota) -> Result<(), StoreError> {
        let Changes { mark, records, .. } = self.store.changes(&self.source, Mark::default()).await?;
        *self.mark.lock().unwrap_or_else(PoisonError::into_inner) = mark;
        for (alias, record) in records {
            let Some(&index) = self.indices.get(&alias) else { continue };
            let configured = Arc::clone(&self.entries()[index].configured);
            match life::choose(&configured, Some(&record)) {
                Choice::Stored => {
                    // What is remembered of the token before may have disabled the account.
                    if record.refused.is_none() && record.origin != Origin::Renewed {
                        quota.release(Scope::Account(index), record.obtained_at).await;
                    }
                    self.take_over(index, record, quota).await;
                }
                Choice::Configured => {
                    self.prefer_configured(index, &configured, &record).await?;
                    if let Some(refused) = record.refused {
                        quota.release(Scope::Account(index), refused.at).await;
                    }
                }
            }
        }
        Ok(())
    }

    /// The configured tokens are newer than the stored ones: everybody is to have them.
    async fn prefer_configured(&self, index: usize, account: &Account, old: &Record) -> Result<(), StoreError> {
        let record = Record {
            revision: old.revision + 1,
            access_token: account.access_token.clone(),
            refresh_token: account.refresh_token.clone(),
            obtained_at: self.clock.now(),
            expires_at: None,
            refresh_expires_at: None,
            origin: Origin::Configured,
            refused: None,
            replaces: life::replaced(&old.replaces, account),
        };
        info!(source = %self.source, account = %account.alias, "the configured token has changed and replaces the stored one");
        self.store.put(&self.source, &account.alias, &record).await?;
        self.adopt(index, record);
        Ok(())
    }

    /// Takes over the credentials that have been changed in the configuration since it was read; whose. Accounts that it
    /// has not had then are left out.
    ///
    /// # Errors
    /// [`StoreError`] where tokens have changed and the others cannot be told; that account, and those after it, stay as
    /// they were.
    pub async fn correct(&self, accounts: &[Account], quota: &dyn Quota) -> Result<Vec<AccountAlias>, StoreError> {
        let mut changed = Vec::new();
        for account in accounts {
            let Some(&index) = self.indices.get(&account.alias) else { continue };
            let before = Arc::clone(&self.entries()[index].configured);
            if before.has_credentials_of(account) {
                continue;
            }
            let configured = before.with_credentials_of(account);
            if life::fingerprint(&before) == life::fingerprint(&configured) {
                self.entries()[index].correct(configured);
            } else {
                self.correct_tokens(index, configured, quota).await?;
            }
            changed.push(account.alias.clone());
        }
        if !changed.is_empty() {
            self.changed.notify_one();
        }
        Ok(changed)
    }

    /// The same as at a start with these tokens, or with the tokens of this app key.
    async fn correct_tokens(&self, index: usize, configured: Account, quota: &dyn Quota) -> Result<(), StoreError> {
        let stored = self.store.get(&self.source, &configured.alias).await?;
        let Some(newest) = self.entries()[index].newer_than(stored) else {
            self.entries()[index].begin_anew(&configured);
            return Ok(());
        };
        match life::choose(&configured, Some(&newest)) {
            Choice::Stored => {
                self.entries()[index].correct(configured);
                self.take_over(index, newest, quota).await;
            }
            Choice::Configured => {
                let death = self.death(index);
                let before = self.entries()[index].correct(configured.clone());
                if let Err(error) = self.prefer_configured(index, &configured, &newest).await {
                    self.entries()[index].correct(before.as_ref().clone());
                    return Err(error);
                }
                if let Some(since) = newest.refused.map(|refused| refused.at).or(death.map(|cause| cause.since)) {
                    quota.release(Scope::Account(index), since).await;
                }
            }
        }
        Ok(())
    }

    /// Whether these are no longer the credentials of this moment.
    #[must_use]
    pub fn is_outdated(&self, index: usize, generation: u64) -> bool {
        self.entries()[index].generation != generation
    }

    /// The account with the tokens of this moment, and their generation for [`Keeper::refused`].
    #[must_use]
    pub fn account(&self, index: usize) -> (Arc<Account>, u64) {
        let entries = self.entries();
        (Arc::clone(&entries[index].account), entries[index].generation)
    }

    /// What a slot of the account is good for, now. After [`Purpose::Renewal`] there must be a [`Keeper::begin`].
    #[must_use]
    pub fn purpose(&self, index: usize) -> Purpose {
        let (now, instant) = (self.clock.now(), Instant::now());
        self.entries()[index].purpose(now, instant)
    }

    /// Takes the right to renew the account's token. Nothing: another process has it, or has renewed it already, or the
    /// store is away.
    pub async fn begin(&self, index: usize) -> Option<Permit> {
        if let Some(permit) = self.entries()[index].permit.take().filter(|permit| permit.until > Instant::now()) {
            return Some(permit);
        }
        let alias = self.entries()[index].configured.alias.clone();
        let begun = self.claim(index, &alias).await;
        if !matches!(begun, Ok(Some(_))) {
            self.entries()[index].is_renewing = false;
        }
        begun.unwrap_or_else(|error| {
            let failures = self.entries()[index].fail(Instant::now());
            warn!(source = %self.source, account = %alias, %error, failures, "cannot renew the token: the token store is unreachable");
            None
        })
    }

    async fn claim(&self, index: usize, alias: &AccountAlias) -> Result<Option<Permit>, StoreError> {
        let Some(claim) = self.store.claim(&self.source, alias, self.call_max + CLAIM_SPARE).await? else {
            self.await_another(index);
            return Ok(None);
        };
        let until = Instant::now() + claim.lasts.saturating_sub(self.call_max);
        let newest = match self.store.get(&self.source, alias).await {
            Ok(newest) => newest,
            Err(error) => {
                self.store.release(claim).await;
                return Err(error);
            }
        };
        // The watch may have found the new token between the slot and the claim.
        if newest.is_some_and(|record| self.adopt(index, record)) || !self.entries()[index].is_due(self.clock.now()) {
            self.store.release(claim).await;
            return Ok(None);
        }
        let account = Arc::clone(&self.entries()[index].account);
        Ok(Some(Permit { index, claim, until, account }))
    }

    /// Another process renews it: look at the store soon, and not at the claim again at once.
    fn await_another(&self, index: usize) {
        let (now, instant) = (self.clock.now(), Instant::now());
        let can_call = self.entries()[index].await_another(now, instant, TAKEN);
        if !can_call {
            *self.hurry_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(instant + HURRY_FOR);
            self.poke.notify_one();
        }
    }

    /// Keeps a right that could not be used in this slot for the next one.
    pub fn keep(&self, permit: Permit) {
        let entry = &mut self.entries()[permit.index];
        entry.is_renewing = false;
        entry.permit = Some(permit);
    }

    /// Gives a right back that could not be used, since the vendor could not be reached from here.
    pub async fn put_back(&self, Permit { index, claim, .. }: Permit) {
        self.store.release(claim).await;
        self.entries()[index].is_renewing = false;
    }

    /// A renewal was broken off.
    pub fn give_up(&self, index: usize) {
        self.entries()[index].is_renewing = false;
    }

    /// What the renewal came to. A new token is stored before anybody calls with it.
    pub async fn finish(&self, permit: Permit, renewed: Result<Tokens, Refusal>) -> Verdict {
        let Permit { index, claim, account, .. } = permit;
        let verdict = match renewed {
            Ok(tokens) => self.renewed(index, &account, tokens).await,
            Err(refusal) => self.not_renewed(index, &account, refusal.redacted(&account)).await,
        };
        self.store.release(claim).await;
        self.entries()[index].is_renewing = false;
        self.changed.notify_one();
        verdict
    }

    async fn renewed(&self, index: usize, account: &Account, tokens: Tokens) -> Verdict {
        let record = self.entries()[index].record_of(account, tokens, self.clock.now());
        let expires_at = record.expires_at;
        let revision = record.revision;
        self.establish(index, record).await;
        self.entries()[index].mark_renewed_here(revision);
        info!(source = %self.source, account = %account.alias, expires_at = expires_at.map(tracing::field::display), "token renewed");
        Verdict::Alive
    }

    async fn not_renewed(&self, index: usize, account: &Account, refusal: Refusal) -> Verdict {
        let failures = self.entries()[index].fail(Instant::now());
        let is_final = match refusal.kind {
            RefusalKind::Denied(_) | RefusalKind::Misconfigured(Common::Params) | RefusalKind::Bug => true,
            RefusalKind::Malformed => failures >= NONSENSE,
            RefusalKind::Outage
            | RefusalKind::Unclear
            // Of no account's making: it is mended without another authorisation.
            | RefusalKind::Misconfigured(Common::Clock | Common::Form | Common::Later)
            | RefusalKind::Throttled { .. } => false,
        };
        if is_final {
            self.die(index, account, &refusal).await;
            return Verdict::Dead;
        }
        let Refusal { code, message, .. } = refusal;
        warn!(source = %self.source, account = %account.alias, code, message, failures, "token renewal failed; trying again");
        Verdict::Alive
    }

    /// A call was refused for its token. Takes over a newer one, or sees to it that there will be one.
    pub async fn refused(&self, index: usize, generation: u64, refusal: &Refusal) -> Verdict {
        let Some(alias) = self.entries()[index].refuse(generation) else { return self.verdict(index) };
        match self.store.get(&self.source, &alias).await {
            Ok(Some(record)) => {
                if self.adopt(index, record) {
                    return self.verdict(index);
                }
            }
            Ok(None) => {}
            Err(error) => {
                warn!(source = %self.source, account = %alias, %error, "cannot check the token store for a newer token");
            }
        }
        let (account, can_be_renewed) = self.entries()[index].after_refusal(self.clock.now());
        if can_be_renewed {
            let code = &refusal.code;
            warn!(source = %self.source, account = %alias, code, "vendor rejected the token; renewing it at the account's next slot");
            return Verdict::Alive;
        }
        if account.refresh_token.is_none() {
            self.die(index, &account, refusal).await;
            return self.verdict(index);
        }
        // Under the claim: a process that renews the token at this moment has made the vendor refuse the one before.
        match self.claim(index, &alias).await {
            Ok(Some(permit)) => {
                self.die(index, &account, refusal).await;
                self.store.release(permit.claim).await;
            }
            Ok(None) => {}
            Err(error) => {
                self.entries()[index].fail(Instant::now());
                warn!(source = %self.source, account = %alias, %error, "cannot check whether another process is renewing the token");
            }
        }
        self.verdict(index)
    }

    /// A call was answered.
    pub fn accepted(&self, index: usize, generation: u64) {
        let entry = &mut self.entries()[index];
        if entry.generation == generation {
            entry.was_accepted = true;
        }
    }

    fn verdict(&self, index: usize) -> Verdict {
        if self.entries()[index].state == State::Dead { Verdict::Dead } else { Verdict::Alive }
    }

    async fn die(&self, index: usize, account: &Account, refusal: &Refusal) {
        let refusal = refusal.clone().redacted(account);
        let refused = Refused { at: self.clock.now(), code: refusal.code, message: refusal.message };
        let record = self.entries()[index].record_of_death(account, refused);
        self.establish(index, record).await;
    }

    /// Stores a record and takes it over; what the store does not take now is offered again by the watch.
    async fn establish(&self, index: usize, record: Record) {
        let alias = self.entries()[index].configured.alias.clone();
        for attempt in 1..=PUTS {
            match self.store.put(&self.source, &alias, &record).await {
                Ok(true) => {
                    self.adopt(index, record);
                    return;
                }
                // Somebody authorised the app meanwhile: that counts, here and for everybody.
                Ok(false) => {
                    let theirs = self.store.get(&self.source, &alias).await.ok().flatten();
                    self.adopt(index, theirs.unwrap_or(record));
                    return;
                }
                Err(error) if attempt == PUTS => {
                    error!(source = %self.source, account = %alias, %error, "cannot store the new token, which is only in memory: if this process ends before the token store is repaired, run `weir account authorise {} {alias}`", self.source);
                }
                Err(_) => sleep(HURRY * attempt).await,
            }
        }
        self.entries()[index].unstored = Some(record.clone());
        self.adopt(index, record);
    }

    /// Takes a record over if it is newer; whether it was.
    fn adopt(&self, index: usize, record: Record) -> bool {
        let refused = record.refused.clone();
        let mut entries = self.entries();
        if !entries[index].adopt(record, self.dice.fraction()) {
            return false;
        }
        let alias = entries[index].configured.alias.clone();
        drop(entries);
        if let Some(Refused { code, message, .. }) = refused {
            error!(source = %self.source, account = %alias, code, message, "vendor rejected the account's token and its renewal: account disabled, other accounts take over; run `weir account authorise {} {alias}`", self.source);
        }
        true
    }

    /// Takes a record over, and the account out of use or back into it.
    async fn take_over(&self, index: usize, record: Record, quota: &dyn Quota) {
        let before = self.death(index);
        if !self.adopt(index, record) {
            return;
        }
        let scope = Scope::Account(index);
        match (before, self.death(index)) {
            (_, Some(cause)) => quota.hold(scope, Hold::Disabled, &cause).await,
            (Some(cause), None) => {
                let (account, _) = self.account(index);
                info!(source = %self.source, account = %account.alias, "found a new token: account enabled again");
                quota.release(scope, cause.since).await;
            }
            (None, None) => {}
        }
    }

    /// Why the account is out of use for its token, and since when: the same for every process, so that a hold which
    /// comes after the release for a new token does not count.
    #[must_use]
    pub fn death(&self, index: usize) -> Option<Cause> {
        self.entries()[index].death.as_ref().map(|refused| Cause::new(&refused.code, refused.at))
    }

    /// Ready when something has changed that a waiting dispatcher should know of.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Looks for what other processes, and `weir account authorise`, put into the store. Never ends.
    pub async fn watch(self: Arc<Self>, quota: Arc<dyn Quota>) {
        let mut is_away = false;
        loop {
            let hurry = *self.hurry_until.lock().unwrap_or_else(PoisonError::into_inner);
            let pause = if hurry.is_some_and(|until| until > Instant::now()) { HURRY } else { WATCH };
            tokio::select! {
                () = sleep(pause) => {}
                () = self.poke.notified() => sleep(HURRY).await,
            }
            match self.look(&*quota).await {
                Ok(()) => is_away = false,
                // Said once: a store that is away is seen by every renewal too.
                Err(error) if !std::mem::replace(&mut is_away, true) => {
                    warn!(source = %self.source, %error, "cannot check for new tokens; using those in memory meanwhile");
                }
                Err(_) => {}
            }
        }
    }

    /// Gives back claims that were kept for a slot which has not come: other processes wait for them.
    async fn put_back_stale(&self) {
        let now = Instant::now();
        let is_stale = |permit: &mut Permit| permit.until <= now;
        let stale: Vec<_> = self.entries().iter_mut().filter_map(|entry| entry.permit.take_if(is_stale)).collect();
        for permit in stale {
            self.store.release(permit.claim).await;
        }
    }

    /// Where the store may have lost what this process calls with (it is another server, or was emptied), it gets that
    /// again: other processes would go on with the configured tokens, which the vendor may long have replaced.
    async fn offer_again(&self, records: &[(AccountAlias, Record)]) -> Result<(), StoreError> {
        let found: HashMap<&AccountAlias, &Record> = records.iter().map(|(alias, record)| (alias, record)).collect();
        let mut offers = Vec::new();
        for (index, entry) in self.entries().iter_mut().enumerate() {
            let alias = entry.configured.alias.clone();
            offers.extend(entry.after_loss(found.get(&alias).copied()).map(|record| (index, alias, record)));
        }
        for (index, alias, record) in offers {
            if self.store.put(&self.source, &alias, &record).await? {
                warn!(source = %self.source, account = %alias, revision = record.revision, place = self.store.place(), "the token store had lost the account's token; stored it again from memory");
            }
            self.adopt(index, record);
        }
        Ok(())
    }

    async fn look(&self, quota: &dyn Quota) -> Result<(), StoreError> {
        self.put_back_stale().await;
        let unstored: Vec<_> = self.entries().iter().filter_map(Entry::unstored).collect();
        for (alias, record) in unstored {
            self.store.put(&self.source, &alias, &record).await?;
            if let Some(&index) = self.indices.get(&alias) {
                self.entries()[index].stored(record.revision);
            }
        }
        let mark = *self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        let Changes { mark, is_whole, records } = self.store.changes(&self.source, mark).await?;
        if is_whole {
            // Before it counts as seen: what fails now is offered the next time.
            self.offer_again(&records).await?;
        }
        *self.mark.lock().unwrap_or_else(PoisonError::into_inner) = mark;
        let has_news = !records.is_empty();
        for (alias, record) in records {
            if let Some(&index) = self.indices.get(&alias) {
                self.take_over(index, record, quota).await;
            }
        }
        if has_news {
            self.changed.notify_one();
        }
        Ok(())
    }
}

/// When a token expires that lives so long from now.
pub(super) fn end_of(now: Timestamp, lives: Option<Duration>) -> Option<Timestamp> {
    lives.map(|lives| now.after(lives))
}

#[cfg(test)]
mod tests;

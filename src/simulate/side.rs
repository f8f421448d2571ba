//! What a gateway knows of its callers: accounts, their quotas and bans, and the fate of a call. No I/O.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use super::{
    catalogue::{Askings, Catalogue, Mishap, Shelf},
    dice::{Question, below, roll},
    gate::{Call, Front, HTML, Reply},
    limiter::{Limiter, Quota},
    product::Showing,
};
use crate::{platform::Account, runtime::clock::Clock};

/// How many troubled items are remembered.
const ASKINGS_LIMIT: usize = 262_144;

/// What the world is made of.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    pub(super) catalogue: Catalogue,
    pub(super) drift: Option<Duration>,
    pub(super) clock: Clock,
}

/// The accounts of one gateway.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) front: Front,
    pub(super) accounts: Vec<Account>,
    /// The index of its first account among all accounts.
    first: usize,
    by_key: HashMap<String, usize>,
    limiters: Vec<Mutex<Limiter>>,
    /// The quota of the API for all its callers.
    api: Mutex<Limiter>,
    /// How many seconds a ban lasts, from and to; `None`: whoever is over is refused once, and that is all.
    ban: Option<[u64; 2]>,
    /// Until when each account is banned, and last the API.
    banned: Mutex<Vec<Duration>>,
    pub(super) setting: Setting,
    askings: Mutex<Askings>,
    calls: AtomicU64,
}

/// Who has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whom {
    Account,
    Everyone,
}

/// Why a call does not get in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shut {
    pub(super) whom: Whom,
    /// For so long.
    pub(super) seconds: u64,
    /// It is this call that was too much; otherwise the ban of an earlier one still lasts.
    pub(super) is_over: bool,
}

impl Side {
    pub(super) fn new(
        front: Front,
        (first, accounts): (usize, Vec<Account>),
        [quota, api]: [Quota; 2],
        ban: Option<[u64; 2]>,
        setting: Setting,
    ) -> Self {
        let phase =
            |index: u64| Duration::from_nanos(roll(setting.catalogue.seed ^ front as u64, Question::Phase, index));
        let count = accounts.len() as u64;
        Self {
            front,
            first,
            by_key: accounts.iter().enumerate().map(|(index, account)| (account.app_key.clone(), index)).collect(),
            limiters: (0..count).map(|index| Mutex::new(Limiter::new(quota, phase(index)))).collect(),
            api: Mutex::new(Limiter::new(api, phase(count))),
            ban,
            banned: Mutex::new(vec![Duration::ZERO; accounts.len() + 1]),
            accounts,
            setting,
            askings: Mutex::new(Askings::new(ASKINGS_LIMIT)),
            calls: AtomicU64::new(0),
        }
    }

    /// The next call's number.
    pub(super) fn serial(&self) -> u64 {
        self.calls.fetch_add(1, Relaxed)
    }

    /// The account with this key.
    pub(super) fn by_key(&self, key: &str) -> Option<usize> {
        self.by_key.get(key).copied()
    }

    /// An account's index among all accounts.
    pub(super) fn among_all(&self, account: usize) -> usize {
        self.first + account
    }

    /// Whether a call gets in, by the time at which it arrived.
    pub(super) fn admit(&self, account: usize, call: &Call<'_>, serial: u64) -> Result<(), Shut> {
        let everyone = self.accounts.len();
        let (mut banned, arrived) = (self.banned.lock().unwrap_or_else(PoisonError::into_inner), call.arrived);
        for (at, whom) in [(account, Whom::Account), (everyone, Whom::Everyone)] {
            if let Some(left) = banned[at].checked_sub(arrived).filter(|left| !left.is_zero()) {
                // Rounded up: whoever waits for that long is not early.
                return Err(Shut {
                    whom,
                    seconds: left.as_secs() + u64::from(left.subsec_nanos() > 0),
                    is_over: false,
                });
            }
        }
        let own = call.is_address_within && lock(&self.limiters[account]).admit(arrived);
        let whom = if !own {
            Whom::Account
        } else if lock(&self.api).admit(arrived) {
            return Ok(());
        } else {
            Whom::Everyone
        };
        let seconds = self.ban.map_or(0, |[from, to]| {
            from + below(roll(self.setting.catalogue.seed, Question::Ban, serial), to - from + 1)
        });
        let at = if whom == Whom::Account { account } else { everyone };
        banned[at] = arrived + Duration::from_secs(seconds);
        Err(Shut { whom, seconds, is_over: true })
    }

    /// Whether a call is throttled though it is within its quota. The first item's fate is the call's.
    pub(super) fn throttles(&self, items: &[u64]) -> bool {
        let catalogue = &self.setting.catalogue;
        let throttles = |item: &u64| catalogue.may_throttle(*item) && catalogue.throttles(*item, self.ask(*item));
        items.first().is_some_and(throttles)
    }

    /// What befalls a call.
    pub(super) fn mishap(&self, items: &[u64]) -> Option<Mishap> {
        let (item, catalogue) = (*items.first()?, &self.setting.catalogue);
        let asked = if catalogue.may_fail(item) { self.ask(item) } else { 0 };
        catalogue.mishap(item, asked)
    }

    /// The reply of a mishap that needs nothing of the vendor's language; `good` is the reply that it befalls.
    pub(super) fn broken(mishap: Mishap, good: impl FnOnce() -> String) -> Option<Reply> {
        Some(match mishap {
            Mishap::Timeout | Mishap::WrongItem => return None,
            Mishap::InternalError => Reply::json(500, r#"{"status":500,"error":"Internal Server Error"}"#.into()),
            Mishap::BadGateway => Reply::bad_gateway(),
            Mishap::Cut => Reply::Cut,
            Mishap::Truncated => {
                let mut body = good();
                let half = (0..=body.len() / 2).rev().find(|at| body.is_char_boundary(*at)).unwrap_or(0);
                body.truncate(half);
                Reply::ok(body)
            }
            Mishap::Page => {
                let body = "<!DOCTYPE html><html><body>系统繁忙，请稍后再试</body></html>".into();
                Reply::Http { status: 200, content_type: HTML, body }
            }
            Mishap::Empty => Reply::ok(String::new()),
        })
    }

    /// What is under an id.
    pub(super) fn shelf(&self, item: u64) -> Shelf {
        self.setting.catalogue.shelf(item)
    }

    /// What has to be known to show an item.
    pub(super) fn showing(&self, id: u64, status: &'static str) -> Showing {
        let Setting { catalogue, drift, clock } = &self.setting;
        Showing { seed: catalogue.seed, id, status, now: clock.now(), drift: *drift }
    }

    /// The vendor's name for a call.
    pub(super) fn request_id(&self, serial: u64) -> String {
        format!("{:012x}", roll(self.setting.catalogue.seed, Question::RequestId, serial) >> 16)
    }

    fn ask(&self, item: u64) -> u32 {
        lock(&self.askings).ask(item)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

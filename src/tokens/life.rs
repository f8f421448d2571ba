//! Token lifetimes: which token an account uses, and when it is renewed. Pure.

use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret, SecretString};
use sha1::Sha1;

use super::Record;
use crate::{platform::Account, runtime::clock::Timestamp};

/// A token that is known to expire within this time is renewed.
const AHEAD: Duration = Duration::from_secs(10 * 60);

/// How long after it was given a token that was never accepted counts as refused for good.
const FRESH: Duration = Duration::from_secs(60);

/// So many fingerprints are remembered: enough for a fleet in which old configurations are still about.
const REPLACES: usize = 16;

/// Stands for the configured credentials of an account without showing them. A changed token changes it; so does another
/// app key, whose tokens are others.
#[must_use]
pub fn fingerprint(account: &Account) -> String {
    let token = |token: &Option<SecretString>| token.as_ref().map_or("", ExposeSecret::expose_secret).to_owned();
    let parts = [account.app_key.clone(), token(&account.access_token), token(&account.refresh_token)];
    // Tokens are random: nobody guesses them from this.
    let mac = Hmac::<Sha1>::new_from_slice(b"weir tokens");
    let mut mac = mac.unwrap_or_else(|_| Hmac::new(&hmac::digest::Key::<Hmac<Sha1>>::default()));
    for part in parts {
        mac.update(&(part.len() as u64).to_be_bytes());
        mac.update(part.as_bytes());
    }
    hex::encode(mac.finalize().into_bytes())
}

/// Whose tokens an account calls with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Those of the configuration.
    Configured,
    /// Those of the record.
    Stored,
}

/// The record wins over the configuration that it has replaced, since that one's tokens are older. Credentials that it
/// does not know have been changed since: they win.
#[must_use]
pub fn choose(account: &Account, record: Option<&Record>) -> Choice {
    match record {
        Some(record) if record.replaces.contains(&fingerprint(account)) => Choice::Stored,
        _ => Choice::Configured,
    }
}

/// What a further record of an account replaces, beside what the one before did.
#[must_use]
pub fn replaced(before: &[String], account: &Account) -> Vec<String> {
    let own = fingerprint(account);
    let others = before.iter().filter(|known| **known != own);
    let mut all: Vec<String> = others.cloned().chain([own.clone()]).collect();
    all.drain(..all.len().saturating_sub(REPLACES));
    all
}

/// What to do about a record that a process holds, when the store may have lost it.
#[derive(Clone, Debug)]
pub enum Kept {
    /// The store has it, or a later one.
    Same,
    /// The store has none, or an older one: it is to have this.
    Offer(Box<Record>),
    /// What the store has is to be used, though its revision is not higher: it was made after the loss.
    Adopt,
}

/// What becomes of the record that a process holds, where the store, which may have lost records, has `found`.
///
/// Revisions count from one again in a store that was emptied. There the later token is the good one, and a token that
/// the vendor has refused is none: a process that began after the loss has tried the configured one, which is long dead.
#[must_use]
pub fn after_loss(held: &Record, found: Option<&Record>) -> Kept {
    let offer = |revision| Kept::Offer(Box::new(Record { revision, ..held.clone() }));
    let Some(found) = found else { return offer(held.revision) };
    if found.revision > held.revision || is_same(found, held) {
        return Kept::Same;
    }
    let is_better = match (found.refused.is_some(), held.refused.is_some()) {
        (true, false) => false,
        (false, true) => true,
        _ => found.obtained_at > held.obtained_at,
    };
    if is_better { Kept::Adopt } else { offer(held.revision.max(found.revision + 1)) }
}

fn is_same(one: &Record, other: &Record) -> bool {
    let token = |record: &Record| record.access_token.as_ref().map(|token| token.expose_secret().to_owned());
    (one.revision, one.obtained_at, &one.refused, token(one))
        == (other.revision, other.obtained_at, &other.refused, token(other))
}

/// The account with the record's tokens in place of its own.
#[must_use]
pub fn with_tokens_of(account: &Account, record: &Record) -> Account {
    let (access_token, refresh_token) = (record.access_token.clone(), record.refresh_token.clone());
    Account { access_token, refresh_token, ..account.clone() }
}

/// When a token is renewed: when nine tenths of its life are over, or ten minutes before its end if that is earlier, but
/// never in the first three quarters. `jitter` (0 to 1) brings it forward by up to a fiftieth of its life, so that
/// accounts that were authorised together are not renewed together.
#[must_use]
pub fn due_at(obtained_at: Timestamp, expires_at: Timestamp, jitter: f64) -> Timestamp {
    let life = expires_at.since(obtained_at);
    let ahead = (life / 10).max(AHEAD.min(life / 4)) + (life / 50).mul_f64(jitter.clamp(0.0, 1.0));
    obtained_at.after(life.saturating_sub(ahead))
}

/// Whether a refusal of a token is the second in a row: it was given just now, has not expired, and no call was ever
/// answered with it. Renewing it once more would bring the same.
#[must_use]
pub fn is_second_refusal(
    obtained_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    was_accepted: bool,
    now: Timestamp,
) -> bool {
    let is_fresh = obtained_at.is_some_and(|at| now.since(at) < FRESH);
    is_fresh && !was_accepted && expires_at.is_none_or(|at| now < at)
}

/// How long to wait after `failures` renewals in a row that came to nothing.
#[must_use]
pub fn backoff(failures: u32) -> Duration {
    Duration::from_secs(1).saturating_mul(1 << failures.saturating_sub(1).min(6)).min(Duration::from_secs(60))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{message::AccountAlias, tokens::Origin};

    fn account(access: &str, refresh: &str) -> Account {
        let token = |text: &str| (!text.is_empty()).then(|| text.into());
        Account {
            app_key: "1".to_owned(),
            app_secret: "s".into(),
            access_token: token(access),
            refresh_token: token(refresh),
            ..Account::named(AccountAlias::new("one").unwrap())
        }
    }

    fn record(replaces: Vec<String>) -> Record {
        Record {
            revision: 3,
            access_token: Some("at-9".into()),
            refresh_token: Some("rt-9".into()),
            obtained_at: Timestamp::from_millis(0),
            expires_at: None,
            refresh_expires_at: None,
            origin: Origin::Renewed,
            refused: None,
            replaces,
        }
    }

    #[test]
    fn a_record_wins_over_the_configuration_that_it_came_from_and_a_changed_one_wins_over_the_record() {
        let configured = account("at-1", "rt-1");
        let stored = record(replaced(&[], &configured));
        assert_eq!(choose(&configured, Some(&stored)), Choice::Stored);
        assert_eq!(choose(&configured, None), Choice::Configured);
        for changed in [account("at-1", "rt-2"), account("at-2", "rt-1"), account("", "rt-1"), account("at-1rt-1", "")]
        {
            assert_eq!(choose(&changed, Some(&stored)), Choice::Configured);
        }
        let other_app = Account { app_key: "2".to_owned(), ..configured.clone() };
        assert_eq!(choose(&other_app, Some(&stored)), Choice::Configured);
        // A process that still has the old configuration does not bring the old token back.
        let newer = record(replaced(&stored.replaces, &account("at-1", "rt-2")));
        assert_eq!(choose(&configured, Some(&newer)), Choice::Stored);
    }

    #[test]
    fn what_a_store_has_lost_is_offered_again_and_what_was_made_since_is_taken_over() {
        let at = |revision, second: i64, refused: bool| Record {
            revision,
            obtained_at: Timestamp::from_millis(second * 1_000),
            access_token: Some(format!("at-{second}").into()),
            refused: refused.then(|| crate::tokens::Refused {
                at: Timestamp::from_millis(second * 1_000),
                code: "401".to_owned(),
                message: String::new(),
            }),
            ..record(Vec::new())
        };
        let what = |held: &Record, found: Option<&Record>| match after_loss(held, found) {
            Kept::Same => "same".to_owned(),
            Kept::Offer(record) => format!("offer {}", record.revision),
            Kept::Adopt => "adopt".to_owned(),
        };
        let held = at(4, 100, false);
        assert_eq!(what(&held, None), "offer 4", "all of it is gone");
        assert_eq!(what(&held, Some(&held)), "same", "nothing is");
        assert_eq!(what(&held, Some(&at(3, 50, false))), "offer 4", "the last renewal did not reach the replica");
        assert_eq!(what(&held, Some(&at(5, 110, false))), "same", "a later one comes as always");
        assert_eq!(what(&held, Some(&at(5, 100, true))), "same", "also that it is refused");
        assert_eq!(what(&held, Some(&at(1, 120, false))), "adopt", "authorised anew after the loss");
        assert_eq!(what(&held, Some(&at(1, 120, true))), "offer 4", "the configured token was tried meanwhile");
        assert_eq!(what(&at(1, 100, false), Some(&at(1, 120, true))), "offer 2", "and has the same number");
        assert_eq!(what(&at(4, 100, true), Some(&at(1, 90, false))), "adopt", "whoever holds a dead one has nothing");
    }

    #[test]
    fn what_is_replaced_is_bounded_and_named_once() {
        let mut all = Vec::new();
        for n in 0..40 {
            all = replaced(&all, &account("at", &format!("rt-{n}")));
            all = replaced(&all, &account("at", &format!("rt-{n}")));
        }
        assert_eq!(all.len(), REPLACES);
        assert_eq!(all.last(), Some(&fingerprint(&account("at", "rt-39"))));
        assert!(all.iter().all(|one| !one.contains("rt")));
    }

    #[test]
    fn a_token_is_renewed_before_its_end_and_late_in_its_life() {
        let minutes = |minutes: u64| Timestamp::from_millis(0).after(Duration::from_secs(minutes * 60));
        let due = |life, jitter| due_at(minutes(0), minutes(life), jitter).since(minutes(0)).as_secs();
        // 1688's ten hours; an hour; twenty minutes, where ten would be half of it.
        assert_eq!((due(600, 0.0), due(60, 0.0), due(20, 0.0)), (540 * 60, 50 * 60, 15 * 60));
        assert_eq!(due(600, 1.0), (540 - 12) * 60);
        assert_eq!(due_at(minutes(5), minutes(1), 0.5), minutes(5), "an end before the beginning is due at once");
    }

    #[test]
    fn a_token_that_was_never_accepted_is_not_renewed_again_and_again() {
        let at = |seconds: i64| Timestamp::from_millis(seconds * 1_000);
        let second = |obtained, expires, accepted| is_second_refusal(obtained, expires, accepted, at(30));
        assert!(second(Some(at(20)), Some(at(600)), false));
        assert!(second(Some(at(20)), None, false));
        assert!(!second(Some(at(20)), None, true), "it has worked: somebody revoked it");
        assert!(!second(Some(at(20)), Some(at(25)), false), "it has simply expired");
        assert!(!second(Some(at(-60)), None, false), "found in the store after a restart");
        assert!(!second(None, None, false), "from the configuration");
    }

    #[test]
    fn renewals_that_fail_come_ever_more_rarely() {
        assert_eq!([1, 2, 3, 7, 40].map(|failures| backoff(failures).as_secs()), [1, 2, 4, 60, 60]);
    }
}

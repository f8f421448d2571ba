//! The gateway's tokens: which count, until when, and what brings new ones. No I/O.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use secrecy::ExposeSecret;

use super::{Call, Gateway, JSON, Outcome, Question, Refusal, Refused, Reply, Verdict, param, roll};
use crate::{
    platform::{
        Account,
        ali1688::{sign, token},
    },
    simulate::accounts,
};

/// How long a code of the authorise page counts.
const CODE_LIFE: Duration = Duration::from_secs(120);

/// How the gateway treats tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenRules {
    /// How long an access token lives; `None`: for ever.
    pub life: Option<Duration>,
    /// A renewal ends the access token and the refresh token before it at once.
    pub rotation: bool,
}

/// What one account holds. Times are since the gateway's start.
#[derive(Debug)]
struct Holder {
    /// Access tokens, and until when they count.
    valid: Vec<(String, Option<Duration>)>,
    given_at: Duration,
    /// `None`: the user has withdrawn the authorisation.
    refresh: Option<String>,
    code: Option<(String, Duration)>,
    /// How many tokens were made: each is rolled from its number.
    made: u64,
}

/// The tokens of all accounts, by index.
#[derive(Debug)]
pub(in crate::simulate) struct Tokens {
    holders: Mutex<Vec<Holder>>,
    pub(in crate::simulate) rules: TokenRules,
    seed: u64,
}

/// Tokens that were given.
pub(in crate::simulate) struct Given {
    pub(in crate::simulate) access: String,
    pub(in crate::simulate) refresh: String,
    pub(in crate::simulate) is_early: bool,
}

impl Tokens {
    pub(in crate::simulate) fn new(accounts: &[Account], rules: TokenRules, seed: u64) -> Self {
        let text = |token: &Option<secrecy::SecretString>| token.as_ref().map(|token| token.expose_secret().to_owned());
        let holder = |account: &Account| Holder {
            valid: text(&account.access_token).map(|token| (token, rules.life)).into_iter().collect(),
            given_at: Duration::ZERO,
            refresh: text(&account.refresh_token),
            code: None,
            made: 0,
        };
        Self { holders: Mutex::new(accounts.iter().map(holder).collect()), rules, seed }
    }

    fn holders(&self) -> MutexGuard<'_, Vec<Holder>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a call may carry this token now.
    pub(in crate::simulate) fn accepts(&self, account: usize, given: Option<&str>, now: Duration) -> bool {
        let holders = self.holders();
        let valid = &holders[account].valid;
        valid.iter().any(|(token, until)| given == Some(token) && until.is_none_or(|until| now < until))
    }

    pub(in crate::simulate) fn revoke(&self, account: usize) {
        let holder = &mut self.holders()[account];
        (holder.refresh, holder.code) = (None, None);
        holder.valid.clear();
    }

    fn token(&self, account: usize, holder: &mut Holder) -> String {
        holder.made += 1;
        self.made(account, holder.made)
    }

    fn made(&self, account: usize, number: u64) -> String {
        let mut bits = roll(self.seed, Question::Credentials, (account as u64) << 32 | number << 1 | 1);
        accounts::token(&mut bits).expose_secret().to_owned()
    }

    /// Every token and code that was ever given, beside those that accounts began with.
    pub(in crate::simulate) fn all(&self) -> Vec<String> {
        let holders = self.holders();
        let of = |(account, holder): (usize, &Holder)| {
            (1..=holder.made).map(move |number| self.made(account, number)).collect::<Vec<_>>()
        };
        holders.iter().enumerate().flat_map(of).collect()
    }

    fn code(&self, account: usize, now: Duration) -> String {
        let holder = &mut self.holders()[account];
        let code = self.token(account, holder);
        holder.code = Some((code.clone(), now + CODE_LIFE));
        code
    }

    pub(in crate::simulate) fn renew(&self, account: usize, given: Option<&str>, now: Duration) -> Option<Given> {
        let holder = &mut self.holders()[account];
        let refresh = holder.refresh.clone().filter(|known| given == Some(known))?;
        let is_early = self.rules.life.is_some_and(|life| now.saturating_sub(holder.given_at) < life / 2);
        if self.rules.rotation {
            holder.valid.clear();
            holder.refresh = Some(self.token(account, holder));
        }
        let refresh = holder.refresh.clone().unwrap_or(refresh);
        Some(Given { refresh, is_early, access: self.give(account, holder, now) })
    }

    fn authorise(&self, account: usize, given: Option<&str>, now: Duration) -> Option<Given> {
        let holder = &mut self.holders()[account];
        // It counts once, whatever comes of it.
        let (code, until) = holder.code.take()?;
        if given != Some(&code) || now >= until {
            return None;
        }
        let refresh = self.token(account, holder);
        holder.refresh = Some(refresh.clone());
        Some(Given { refresh, is_early: false, access: self.give(account, holder, now) })
    }

    fn give(&self, account: usize, holder: &mut Holder, now: Duration) -> String {
        let access = self.token(account, holder);
        holder.valid.retain(|(_, until)| until.is_none_or(|until| now < until));
        holder.valid.push((access.clone(), self.rules.life.map(|life| now + life)));
        holder.given_at = now;
        access
    }
}

impl Gateway {
    /// The user withdraws the authorisation: no token of the account counts any more. False if there is none such.
    pub(in crate::simulate) fn revoke(&self, alias: &str) -> bool {
        let index = self.accounts.iter().position(|account| account.alias.as_str() == alias);
        index.inspect(|index| self.tokens.revoke(*index)).is_some()
    }

    /// Every secret that there is or was.
    pub(in crate::simulate) fn secrets(&self) -> Vec<String> {
        let of = |account: &Account| {
            let tokens = [account.access_token.clone(), account.refresh_token.clone()];
            tokens.into_iter().flatten().chain([account.app_secret.clone()]).collect::<Vec<_>>()
        };
        let began = self.accounts.iter().flat_map(of).map(|secret| secret.expose_secret().to_owned());
        began.chain(self.tokens.all()).collect()
    }

    /// The authorise page, whose user says yes: where it sends the browser, with a code. `None`: the link is wrong.
    pub(in crate::simulate) fn authorise_page(&self, params: &[(String, String)], now: Duration) -> Option<String> {
        let index = *self.by_key.get(param(params, "client_id")?)?;
        let secret = self.accounts[index].app_secret.expose_secret();
        if param(params, "site") != Some("1688") || !sign::verify("", params, secret, param(params, sign::SIGNATURE)?) {
            return None;
        }
        let (back, state) = (param(params, "redirect_uri")?, param(params, "state").unwrap_or_default());
        let join = if back.contains('?') { '&' } else { '?' };
        Some(format!("{back}{join}code={}&state={state}", self.tokens.code(index, now)))
    }

    /// A call to the token endpoint. It needs no signature, but it counts like any other call.
    pub(super) fn judge_token(&self, key: &str, call: &Call<'_>, serial: u64) -> Verdict {
        let mut verdict = Verdict {
            outcome: Outcome::Renewed { early: false },
            account: None,
            items: Vec::new(),
            reply: Reply::Cut,
            serial,
        };
        let (outcome, reply) = match self.given(key, call, &mut verdict) {
            Ok(given) => (Outcome::Renewed { early: given.is_early }, self.token_body(&given)),
            Err(refusal) => (refusal.outcome, self.refusal_body(serial, &refusal)),
        };
        Verdict { outcome, reply, ..verdict }
    }

    fn given(&self, key: &str, call: &Call<'_>, verdict: &mut Verdict) -> Result<Given, Refusal> {
        let unknown = || Refusal::new("gw.AppKeyNotFound", format!("The request app key {key} is not found"));
        let index = *self.by_key.get(key).ok_or_else(unknown)?;
        verdict.account = Some(index);
        if !call.is_address_within {
            return Err(Refusal::throttle(Outcome::Refused(Refused::Violation)));
        }
        self.check_frequency(call.arrived, index, None, verdict)?;
        let of = |name| param(call.params, name);
        if of("client_id") != Some(key) || of("client_secret") != Some(self.accounts[index].app_secret.expose_secret())
        {
            return Err(self.unauthorised(verdict.serial));
        }
        let given = match of("grant_type") {
            Some("refresh_token") => self.tokens.renew(index, of("refresh_token"), call.arrived),
            Some("authorization_code") if of("redirect_uri").is_some() => {
                self.tokens.authorise(index, of("code"), call.arrived)
            }
            _ => return Err(Refusal::new("gw.ParamMissing", "Required argument grant_type")),
        };
        given.ok_or_else(|| self.unauthorised(verdict.serial))
    }

    /// Seen in the wild with either status: a client has to read the body.
    pub(super) fn unauthorised(&self, serial: u64) -> Refusal {
        let odd = roll(self.catalogue.seed, Question::TokenSpelling, serial) % 2 == 1;
        Refusal {
            outcome: Outcome::Refused(Refused::Unauthorised),
            status: if odd { 401 } else { 200 },
            ..Refusal::new("401", "Request need user authorized")
        }
    }

    fn token_body(&self, given: &Given) -> Reply {
        let life = self.tokens.rules.life.unwrap_or(Duration::from_secs(36_000));
        let timeout = self.clock.now().after(Duration::from_secs(180 * 24 * 60 * 60));
        let timeout = jiff::Timestamp::from_millisecond(timeout.as_millis()).unwrap_or_default();
        let body = serde_json::json!({
            "aliId": "8888888888",
            "resource_owner": "simulated",
            "memberId": "b2b-8888888888",
            "expires_in": life.as_secs().to_string(),
            "access_token": given.access,
            "refresh_token": given.refresh,
            "refresh_token_timeout": timeout.strftime("%Y%m%d%H%M%S000+0000").to_string(),
        });
        Reply::Http { status: 200, content_type: JSON, body: body.to_string() }
    }
}

/// The app key, if the path is the token endpoint's.
pub(super) fn app_key(path: &str) -> Option<&str> {
    path.strip_prefix(token::PATH)
}

//! What an operator sets, and reports that are not taken.

use super::*;
use crate::{
    message::Pause,
    quota::{Cause, Lease, Pacing, Share, Tally, memory::Memory},
};

/// How many calls may be made in ten seconds.
async fn calls(quota: &dyn Quota) -> usize {
    let until = Instant::now() + Duration::from_secs(10);
    let mut calls = 0;
    while Instant::now() < until {
        if let Lease::Slots(slots) = quota.lease(64).await {
            calls += slots.len();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    calls
}

#[tokio::test(start_paused = true)]
async fn what_an_operator_sets_slows_pauses_and_resumes_and_the_calendars_share_stays() {
    let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
    let source = SourceName::new("ali1688").unwrap();
    let aliases: Aliases = ["one", "two"].map(|name| AccountAlias::new(name).unwrap()).into();
    let limit = Limit::new(10, Duration::from_secs(1), 1).unwrap();
    let quota = Memory::new(vec![Some(limit); 2], Pacing::default());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let none = |account: Option<&AccountAlias>| QuotaSetting::none(source.clone(), account.cloned(), clock.now());
    let set = async |before: Option<QuotaSetting>, now: QuotaSetting| {
        put_into_effect(&Changed { before, now }, &quota, &aliases, &clock, None).await;
    };
    let whole = calls(&quota).await;
    let half = QuotaSetting { pace: Some(0.5), ..none(None) };
    set(None, half.clone()).await;
    let slower = calls(&quota).await;
    assert!(slower.abs_diff(whole / 2) <= 2, "{slower} of {whole}");

    quota.set_pace(Scope::Source, PaceBy::Calendar, Share::new(0.5).unwrap()).await;
    set(None, QuotaSetting { pace: Some(0.1), ..none(Some(&aliases[1])) }).await;
    let shares = [Scope::Source, Scope::Account(0), Scope::Account(1)].map(|scope| quota.pace(scope).share);
    assert_eq!(shares.map(f64::to_bits), [0.25_f64, 1.0, 0.1].map(f64::to_bits));
    set(Some(half.clone()), none(None)).await;
    assert_eq!(quota.pace(Scope::Source).share.to_bits(), 0.5_f64.to_bits(), "the calendar's stays");

    let pause = Pause { since_at: clock.now(), until_at: None, reason: "sale".to_owned() };
    let paused = QuotaSetting { paused: Some(pause), ..none(None) };
    set(Some(none(None)), paused.clone()).await;
    assert_eq!(calls(&quota).await, 0);
    set(Some(paused), QuotaSetting { resumed_at: Some(clock.now()), ..none(None) }).await;
    assert!(calls(&quota).await > 0);
}

#[tokio::test(start_paused = true)]
async fn an_address_that_was_taken_out_is_resumed_by_its_name_and_nobody_else_with_it() {
    let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
    let source = SourceName::new("ali1688").unwrap();
    let aliases: Aliases = [AccountAlias::new("one").unwrap()].into();
    let limit = Limit::new(10, Duration::from_secs(1), 1).unwrap();
    let quota = Memory::new(vec![Some(limit)], Pacing::default());
    let cause = Cause::new("no connection", clock.now());
    quota.hold(Scope::Address(0), Hold::Until(Instant::now() + Duration::from_secs(600)), &cause).await;
    assert_eq!(calls(&quota).await, 0);
    let resume = async |name: &str| {
        let setting = QuotaSetting::of_address(source.clone(), name.to_owned(), clock.now());
        let now = QuotaSetting { resumed_at: Some(clock.now()), ..setting };
        put_into_effect(&Changed { before: None, now }, &quota, &aliases, &clock, None).await;
    };
    resume("another").await;
    assert_eq!(calls(&quota).await, 0, "this worker has no such address");
    resume("0").await;
    assert!(calls(&quota).await > 0);
}

/// Sees whether calls can leave at the time.
struct Watches(Arc<Memory>, std::sync::Mutex<Vec<bool>>);

#[async_trait]
impl BeforeResume for Watches {
    async fn before_resume(&self) {
        let can_call = self.0.lease(1).await != Lease::Nobody;
        self.1.lock().unwrap().push(can_call);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_to_be_done_before_a_resume_is_done_while_nobody_calls_and_for_no_other_setting() {
    let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
    let source = SourceName::new("ali1688").unwrap();
    let aliases: Aliases = [AccountAlias::new("one").unwrap()].into();
    let limit = Limit::new(10, Duration::from_secs(1), 1).unwrap();
    let quota = Arc::new(Memory::new(vec![Some(limit)], Pacing::default()));
    quota.hold(Scope::Account(0), Hold::Disabled, &Cause::new("gw.SignatureInvalid", clock.now())).await;
    let watches = Watches(Arc::clone(&quota), std::sync::Mutex::default());
    let none = QuotaSetting::none(source.clone(), aliases.first().cloned(), clock.now());
    let of_address = QuotaSetting::of_address(source, "0".to_owned(), clock.now());
    let resumed_at = Some(clock.now());
    for now in [
        QuotaSetting { pace: Some(0.5), ..none.clone() },
        QuotaSetting { resumed_at, ..of_address },
        QuotaSetting { resumed_at, ..none },
    ] {
        let changed = Changed { before: None, now };
        put_into_effect(&changed, quota.as_ref(), &aliases, &clock, Some(&watches)).await;
    }
    assert_eq!(*watches.1.lock().unwrap(), [false]);
    assert!(calls(quota.as_ref()).await > 0);
}

fn writing(has_budgets: bool) -> Writing {
    let clock = Clock::simulated(Timestamp::from_millis(1_700_000_000_000));
    let reporter = Reporter {
        allowance: Arc::default(),
        topic: "quota".into(),
        source: SourceName::new("ali1688").unwrap(),
        instance: "w".to_owned(),
        aliases: [AccountAlias::new("one").unwrap()].into(),
        allowed: vec![String::new()],
        quota: Arc::new(Memory::new(vec![None], Pacing::default())),
        purse: None,
        tally: Arc::new(Tally::new(1, clock.clone())),
        clock,
    };
    let nowhere = Config { brokers: "127.0.0.1:1".to_owned(), ..Config::default() };
    Writing::new(Arc::new(reporter), Producer::new(&nowhere).unwrap(), has_budgets)
}

#[tokio::test(start_paused = true)]
async fn who_cannot_report_what_it_spends_stops_before_the_doubt_is_too_great_and_others_go_on() {
    for has_budgets in [true, false] {
        let mut writing = writing(has_budgets);
        let refused = |writing: &Writing| Err(writing.refused("away".to_owned()));
        tokio::time::sleep(UNREPORTED).await;
        assert!(writing.take(refused(&writing)).is_ok());
        writing.take(Ok(vec![(0, 7)])).unwrap();
        assert_eq!(writing.prints, [Some(7)]);
        tokio::time::sleep(UNREPORTED).await;
        assert!(writing.take(refused(&writing)).is_ok(), "one was taken in between");
        tokio::time::sleep(EVERY).await;
        let end = writing.take(refused(&writing));
        assert_eq!(matches!(end, Err(JournalError::Unreported { .. })), has_budgets);
    }
    let turns = Duration::from_secs(TURNS.into());
    assert!(UNREPORTED + WRITE_WITHIN + turns + EVERY < past::UNREPORTED_MAX);
}

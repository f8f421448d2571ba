//! What reports and settings come to, for a process that begins.

use super::*;
use crate::{
    message::{AccountReport, AddressReport, SourceName, WholeReport},
    quota::tally::midnight,
};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_millis((1_700_000_000 + seconds) * 1_000)
}

fn alias(name: &str) -> AccountAlias {
    AccountAlias::new(name).unwrap()
}

fn spent(calls: u64) -> Spent {
    Spent { width: 864_000_000, shift: 0, span: 102, calendar: None, first: 1_967_592, calls: vec![calls] }
}

fn report(instance: &str, reported_at: Timestamp, calls: u64, held: Option<HoldReport>) -> QuotaReport {
    let account = AccountReport {
        alias: alias("one"),
        allowed: String::new(),
        calls,
        calls_last_minute: 0,
        refused: 0,
        late: 0,
        returned: 0,
        held,
        used_up: None,
        address: None,
        next_at: None,
        spent: vec![spent(calls)],
    };
    QuotaReport {
        source: SourceName::new("ali1688").unwrap(),
        instance: instance.to_owned(),
        chunk: 0,
        chunks: 1,
        reported_at,
        counted_at: reported_at,
        day_at: midnight(reported_at),
        closed: false,
        whole: Some(WholeReport { spent: vec![spent(calls)], ..WholeReport::default() }),
        accounts: vec![account],
    }
}

fn learned(reports: &[QuotaReport], now: Timestamp) -> PastOf {
    merge(reports, &Settings::default(), now).accounts[&alias("one")].clone()
}

fn hold(until_at: Option<Timestamp>, since_at: Timestamp) -> HoldReport {
    HoldReport { until_at, reason: "401".to_owned(), since_at }
}

#[test]
fn after_a_kill_the_pace_times_the_outage_counts_as_spent_and_after_an_orderly_end_nothing() {
    let killed = learned(&[report("a", at(0), 20, None)], at(3));
    assert_eq!(killed.doubted_calls(500_000), 7, "3 s at 2/s, and one");
    assert_eq!(killed.doubted_calls(0), u64::MAX, "of what nobody calls nothing is known");
    let closed = learned(&[QuotaReport { closed: true, ..report("a", at(0), 20, None) }], at(3));
    assert_eq!((closed.doubted_calls(500_000), closed.doubted_calls(0)), (0, 0));
}

#[test]
fn an_outage_of_a_night_costs_no_more_than_the_time_that_a_worker_may_call_unreported() {
    let killed = learned(&[report("a", at(0), 20, None)], at(30_000));
    assert_eq!(killed.doubt(), UNREPORTED_MAX);
    assert_eq!(killed.doubt_until, at(60));
}

#[test]
fn who_reported_last_knows_what_those_before_it_spent() {
    let first = report("a", at(0), 20, None);
    let second = QuotaReport { closed: true, ..report("b", at(500), 35, None) };
    let past = learned(&[first, second], at(1_000));
    assert_eq!(past.spent, vec![spent(35)]);
    assert_eq!(past.doubt(), Duration::ZERO, "the doubt about the first is part of what the second reported");
}

#[test]
fn a_worker_that_may_still_call_leaves_doubt_though_another_has_ended_in_good_order_since() {
    let running = report("a", at(0), 20, None);
    let closed = QuotaReport { closed: true, ..report("b", at(1), 21, None) };
    assert_eq!(learned(&[running, closed], at(5)).doubt(), Duration::from_secs(4));
}

#[test]
fn with_redis_what_was_counted_is_older_than_the_report_and_the_difference_is_doubt() {
    let report = QuotaReport { closed: true, counted_at: at(-2), ..report("a", at(0), 20, None) };
    assert_eq!(learned(&[report], at(9)).doubt(), Duration::from_secs(2));
}

#[test]
fn holds_of_all_workers_count_until_they_are_over_or_an_operator_resumes() {
    let until = |until: i64| report("a", at(0), 1, Some(hold(Some(at(until)), at(-5))));
    assert!(learned(&[until(10)], at(5)).held.is_some());
    assert_eq!(learned(&[until(10)], at(11)).held, None);
    let disabled = report("b", at(0), 1, Some(hold(None, at(-5))));
    let known = learned(&[until(10), disabled.clone()], at(11)).held.unwrap();
    assert_eq!((known.until, &*known.cause.reason), (None, "401"));

    let mut setting = QuotaSetting::none(disabled.source.clone(), Some(alias("one")), at(6));
    setting.resumed_at = Some(at(-6));
    let resumed = |setting: &QuotaSetting| {
        let accounts = HashMap::from([(setting.account.clone(), setting.clone())]);
        let settings = Settings { accounts, ..Settings::default() };
        merge([&disabled], &settings, at(11)).accounts[&alias("one")].held.clone()
    };
    assert!(resumed(&setting).is_some(), "it was disabled after it was resumed");
    setting.resumed_at = Some(at(6));
    assert_eq!(resumed(&setting), None);
    setting.account = Some(alias("two"));
    assert!(resumed(&setting).is_some(), "another was resumed");
}

#[test]
fn an_address_is_known_by_its_name_whatever_its_place() {
    let address =
        |name: &str, held| AddressReport { name: name.to_owned(), held, used_up: None, spent: vec![spent(3)] };
    let of = |addresses| {
        let whole = Some(WholeReport { addresses, ..WholeReport::default() });
        QuotaReport { whole, ..report("a", at(0), 1, None) }
    };
    let first = of(vec![address("left", None), address("right", Some(hold(Some(at(60)), at(0))))]);
    let past = merge([&first, &of(vec![address("right", None)])], &Settings::default(), at(5));
    assert_eq!(past.addresses.len(), 2);
    assert_eq!((past.addresses["left"].held.is_some(), past.addresses["right"].held.is_some()), (false, true));
    assert_eq!(past.addresses["right"].spent, vec![spent(3)]);
    let resumed = QuotaSetting::of_address(first.source.clone(), "right".to_owned(), at(4));
    let resumed = QuotaSetting { resumed_at: Some(at(4)), ..resumed };
    let settings = Settings { addresses: HashMap::from([("right".to_owned(), resumed)]), ..Settings::default() };
    assert_eq!(merge([&first], &settings, at(5)).addresses["right"].held, None, "an operator has resumed it");
    assert_eq!(merge([&first], &Settings::default(), at(61)).addresses["right"].held, None, "it is over");
}

#[test]
fn without_reports_nothing_is_known_though_somebody_looked() {
    let past = merge(&[], &Settings::default(), at(0));
    assert!(past.is_read && !past.is_known);
    assert!(!Past::default().is_read);
}

#[test]
fn a_budget_takes_the_past_of_its_own_limit_else_of_the_one_most_like_it() {
    let of = |width, span| Spent { width, span, ..spent(1) };
    let rule =
        |width, span| Rule { calls: 9, width, shift: 0, span, before: 0, after: 0, learns: false, calendar: None };
    let past = PastOf { spent: vec![of(600, 102), of(864_000, 102)], ..PastOf::default() };
    assert_eq!(past.of(&rule(600, 102)).unwrap().width, 600);
    assert_eq!(past.of(&rule(36_000, 102)).unwrap().width, 864_000);
    assert_eq!(past.of(&rule(9_000_000, 102)).unwrap().width, 864_000);
    assert_eq!(PastOf::default().of(&rule(600, 102)), None);
}

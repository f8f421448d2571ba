//! What is shown of reports and settings.

use super::*;
use crate::{
    kafka::Record,
    message::Pause,
    quota::journal::known::{report_key, setting_key},
};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_millis((1_700_000_000 + seconds) * 1_000)
}

fn source() -> SourceName {
    SourceName::new("ali1688").unwrap()
}

fn alias(name: &str) -> AccountAlias {
    AccountAlias::new(name).unwrap()
}

fn record(key: String, value: &impl Serialize) -> Record {
    let value = Some(serde_json::to_vec(value).unwrap().into());
    Record { offset: 0, time: at(0), key: Some(key.into()), value, headers: Vec::new(), log: None }
}

fn report(instance: &str, reported_at: Timestamp, calls: u64, held: Option<&HoldReport>) -> Record {
    let report = serde_json::json!({
        "source": "ali1688", "instance": instance, "chunk": 0, "chunks": 1, "reported_at": reported_at,
        "counted_at": reported_at, "day_at": midnight(reported_at), "accounts": [
            {"alias": "one", "allowed": "10/1s", "calls": calls, "calls_last_minute": 2, "held": held},
        ],
    });
    record(report_key(&source(), instance, 0), &report)
}

fn known(records: &[Record]) -> Known {
    let mut known = Known::default();
    for record in records {
        known.take("t", record);
    }
    known
}

fn configured() -> Configured {
    vec![(source(), vec![(alias("one"), "9/1s".to_owned()), (alias("two"), "9/1s".to_owned())])]
}

fn held(until_at: Option<Timestamp>, since: i64) -> HoldReport {
    HoldReport { until_at, reason: "gw.Qos".to_owned(), since_at: at(since) }
}

#[test]
fn calls_of_all_workers_are_added_and_those_of_yesterday_are_not() {
    let yesterday = Timestamp::from_millis(midnight(at(0)).as_millis() - 1);
    let records = [report("a", at(0), 5, None), report("b", at(-1), 7, None), report("c", yesterday, 100, None)];
    let view = &views(&known(&records), &configured(), at(1))[0];
    let one = &view.accounts[0];
    assert_eq!((one.calls_today, one.calls_last_minute, one.standing.state), (12, 4, "calling"));
    assert_eq!((one.allowed.as_str(), view.accounts[1].allowed.as_str()), ("10/1s", "9/1s"));
    let runs: Vec<bool> = view.workers.iter().map(|worker| worker.runs).collect();
    assert_eq!(runs, [true, true, false]);
    assert!(view.followers(at(1)).contains("a, b"));
}

#[test]
fn a_pause_goes_before_a_hold_and_what_was_resumed_holds_nobody() {
    let mut setting = QuotaSetting::none(source(), Some(alias("one")), at(0));
    let state = |setting: &QuotaSetting, held: &HoldReport| {
        let key = setting_key(setting);
        let known = known(&[report("a", at(0), 1, Some(held)), record(key, setting)]);
        let standing = views(&known, &configured(), at(10)).remove(0).accounts.remove(0).standing;
        standing.words(at(10))
    };
    assert_eq!(state(&setting, &held(Some(at(70)), -5)), "held until 2023-11-14T22:14:30Z (1 min 0 s): gw.Qos");
    assert_eq!(state(&setting, &held(None, -5)), "disabled since 2023-11-14T22:13:15Z: gw.Qos");
    assert_eq!(state(&setting, &held(Some(at(9)), -5)), "calling", "it is over");
    setting.paused = Some(Pause { since_at: at(0), until_at: Some(at(20)), reason: "sale".to_owned() });
    setting.pace = Some(0.5);
    assert_eq!(state(&setting, &held(None, -5)), "paused until 2023-11-14T22:13:40Z (10 s): sale; pace 50%");
    setting.paused = None;
    setting.resumed_at = Some(at(1));
    assert_eq!(state(&setting, &held(None, -5)), "calling; pace 50%");
    assert_eq!(state(&setting, &held(None, 2)), "disabled since 2023-11-14T22:13:22Z: gw.Qos; pace 50%");
}

/// A worker's report: `one` calls from proxy-1, `two` from proxy-2, and proxy-1 is held.
fn report_of_addresses(names: &[&str]) -> Record {
    let address = |name: &&str| {
        serde_json::json!({
            "name": name, "held": (*name == "proxy-1").then(|| held(Some(at(20)), -5)),
        })
    };
    let account = |(alias, address): (&str, Option<&str>)| serde_json::json!({"alias": alias, "calls": 1, "calls_last_minute": 2, "address": address});
    let several = |name| (names.len() > 1).then_some(name);
    let report = serde_json::json!({
        "source": "ali1688", "instance": "a", "chunk": 0, "chunks": 1, "reported_at": at(0), "counted_at": at(0),
        "day_at": midnight(at(0)), "whole": {"addresses": names.iter().map(address).collect::<Vec<_>>()},
        "accounts": [account(("one", several("proxy-1"))), account(("two", several("proxy-2")))],
    });
    record(report_key(&source(), "a", 0), &report)
}

#[test]
fn a_held_address_is_shown_with_its_accounts_and_the_others_go_on() {
    let known = known(&[report_of_addresses(&["proxy-1", "proxy-2"])]);
    let view = views(&known, &configured(), at(1)).remove(0);
    let states: Vec<_> = view.accounts.iter().map(|account| account.standing.state).collect();
    assert_eq!(states, ["held", "calling"]);
    assert_eq!(&*view.accounts[0].standing.reason, "address proxy-1: gw.Qos");
    let counts: Vec<_> = view.addresses.iter().map(|address| (address.standing.state, address.accounts)).collect();
    assert_eq!(counts, [("held", 1), ("ready", 1)]);
    assert!(view.still_held(Some(&alias("one")), &Wish::Resume, at(1))[0].contains("address proxy-1"));
    assert!(view.still_held(None, &Wish::Resume, at(1)).is_empty(), "resuming an account would not help");
    let text = text(&[view], at(1));
    assert!(text.contains("(address proxy-1, 1 account)") && !text.contains("(address proxy-2"), "{text}");
    let later = views(&known, &configured(), at(21)).remove(0);
    assert_eq!(later.accounts[0].standing.state, "calling", "it is over");
}

#[test]
fn if_the_only_address_is_held_all_accounts_wait_for_it() {
    let known = known(&[report_of_addresses(&["proxy-1"])]);
    let view = views(&known, &configured(), at(1)).remove(0);
    assert!(view.accounts.iter().all(|account| account.standing.state == "held"));
    assert_eq!(view.addresses[0].accounts, 2);
    assert!(views(&known, &configured(), at(41))[0].addresses.is_empty(), "nothing to tell of it");
}

#[test]
fn without_a_worker_it_says_so_and_since_when() {
    let view = &views(&known(&[]), &configured(), at(0))[0];
    assert_eq!(view.followers(at(0)), "no worker has ever reported; it takes effect when one starts");
    let view = &views(&known(&[report("a", at(0), 1, None)]), &configured(), at(100))[0];
    assert!(view.followers(at(100)).starts_with("no worker reports since 2023-11-14T22:13:20.000Z (1 min 40 s ago)"));
    assert!(text(&views(&known(&[]), &configured(), at(0)), at(0)).contains("no worker has ever reported"));
}

#[test]
fn an_unknown_account_is_told_which_there_are() {
    let view = &views(&known(&[]), &configured(), at(0))[0];
    assert_eq!(view.has(&alias("two")), Ok(()));
    assert_eq!(view.has(&alias("three")).unwrap_err(), "known: one, two");
    let many = (0..12).map(|n| (alias(&format!("a{n}")), String::new())).collect();
    let view = &views(&known(&[]), &vec![(source(), many)], at(0))[0];
    assert!(view.has(&alias("three")).unwrap_err().ends_with("and 2 more: `weir quota --source ali1688`"));
}

#[test]
fn who_resumes_a_source_hears_of_accounts_that_stay_out_and_the_other_way_round() {
    let known = known(&[report("a", at(0), 1, Some(&held(None, -5)))]);
    let view = views(&known, &configured(), at(1)).remove(0);
    let lines = view.still_held(None, &Wish::Resume, at(1));
    assert!(lines[0].starts_with("1 of its accounts stay held (one)"), "{lines:?}");
    assert!(view.still_held(Some(&alias("one")), &Wish::Resume, at(1)).is_empty());
    assert!(view.still_held(None, &Wish::Pace(0.5), at(1)).is_empty());
    assert_eq!(view.after_all_holds(at(-100)), at(-5).after(Duration::from_millis(1)));
}

#[test]
fn what_batches_have_spent_is_added_up_once_and_who_is_without_redis_is_named() {
    let part = |holder: &str, granted: u64, calls: u64, seq: u64| serde_json::json!({ "holder": holder, "granted": granted, "calls": calls, "seq": seq });
    let report = |instance: &str, cut_off: serde_json::Value, parts: &[serde_json::Value]| {
        let report = serde_json::json!({
            "source": "ali1688", "instance": instance, "chunk": 0, "chunks": 1, "reported_at": at(0), "counted_at": at(0),
            "day_at": midnight(at(0)), "accounts": [], "whole": {
                "cut_off": cut_off, "batches": [{ "batch": "monday", "allowed": 100, "parts": parts }],
            },
        });
        record(report_key(&source(), instance, 0), &report)
    };
    // The first one has heard of an earlier word of the second.
    // As 0.1.0 has it.
    let away = serde_json::json!({ "since_at": at(-120), "calls": 34 });
    let first = report("w1", away, &[part("a", 40, 38, 7), part("b", 30, 11, 3)]);
    let second = report("w2", serde_json::Value::Null, &[part("a", 40, 31, 6), part("b", 25, 25, 4)]);
    let views = views(&known(&[first, second]), &configured(), at(1));
    let Batch { allowed, calls, held, left, .. } = views[0].batches[0];
    assert_eq!((allowed, calls, held, left), (100, 63, 2, 35));
    let text = text(&views, at(1));
    assert!(text.contains("w1: disconnected from Redis for 2 min 1 s, uses up the slots that it has"), "{text}");
    assert!(!text.contains("stopped"), "the other one calls: {text}");
    let line = text.lines().find(|line| line.contains("monday")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words, ["ali1688", "monday", "100", "63", "2", "35"]);
}

#[test]
fn an_account_is_not_ready_while_all_workers_wait_for_redis() {
    let delays = serde_json::json!({ "late_ms": 43, "bunched_ms": 7, "pace": 0.62 });
    let report = |instance: &str, cut_off: serde_json::Value| {
        let report = serde_json::json!({
            "source": "ali1688", "instance": instance, "chunk": 0, "chunks": 1, "reported_at": at(0), "counted_at": at(0),
            "day_at": midnight(at(0)), "accounts": [{ "alias": "one" }], "whole": { "cut_off": cut_off, "delays": delays },
        });
        record(report_key(&source(), instance, 0), &report)
    };
    let away = |since: i64| serde_json::json!({ "since_at": at(since), "calls": 0, "stopped": true });
    let of = |second: serde_json::Value| {
        let views = views(&known(&[report("w1", away(-90)), report("w2", second)]), &configured(), at(1));
        (views[0].whole.state, views[0].accounts[0].standing.state, text(&views, at(1)))
    };
    let (whole, account, text) = of(away(-30));
    assert_eq!((whole, account), ("stopped", "stopped"));
    assert!(text.contains("w1: disconnected from Redis for 1 min 31 s; calls stopped until it is back"), "{text}");
    assert!(text.contains("Redis unreachable"), "{text}");
    assert!(
        text.contains("w2: calls leave up to 43 ms late, replies arrive up to 7 ms late together: pace lowered to 62%"),
        "{text}"
    );
    let (whole, account, _) = of(serde_json::Value::Null);
    assert_eq!((whole, account), ("ready", "ready"), "one of them still calls");
}

#[test]
fn a_budget_that_is_spent_is_shown_with_its_money_and_when_calls_go_on_until_then() {
    let used_up = |until: i64, reason: &str| UsedUpReport { until_at: at(until), reason: reason.to_owned() };
    let mut reports = [report("a", at(0), 5, None), report("b", at(0), 5, None)];
    for (record, until) in reports.iter_mut().zip([3_600, 3_602]) {
        let mut report: serde_json::Value = serde_json::from_slice(record.value.as_ref().unwrap()).unwrap();
        report["whole"] = serde_json::json!({"used_up": used_up(until, "day budget spent, 400.00 of 400.00 CNY")});
        report["accounts"][0]["used_up"] = serde_json::json!(used_up(60, "budget spent, 9 of 9 calls of 9/1h"));
        record.value = Some(serde_json::to_vec(&report).unwrap().into());
    }
    let known = known(&reports);
    let view = views(&known, &configured(), at(1)).remove(0);
    assert_eq!((view.whole.state, view.whole.until_at), ("spent", Some(at(3_602))));
    let words = view.whole.words(at(1));
    assert!(words.starts_with("day budget spent, 400.00 of 400.00 CNY, resumes 2023-11-14T23:13:22Z (1 h"), "{words}");
    assert!(text(std::slice::from_ref(&view), at(1)).contains(&words));
    let json = serde_json::to_value(&view).unwrap();
    assert_eq!((&json["state"], &json["reason"]), (&"spent".into(), &"day budget spent, 400.00 of 400.00 CNY".into()));
    assert_eq!(view.accounts[0].standing.state, "spent");
    let still = view.still_held(None, &Wish::Resume, at(1));
    assert!(still.len() == 1 && still[0].contains("it can be raised, not resumed"), "{still:?}");
    let later = &views(&known, &configured(), at(61))[0];
    assert_eq!((later.accounts[0].standing.state, later.whole.state), (READY, "spent"));
    assert_eq!(views(&known, &configured(), at(4_000))[0].whole.state, READY);
}

#[test]
fn what_was_called_for_twice_today_is_said_and_that_of_yesterday_is_not() {
    let report = |instance: &str, reported_at: Timestamp, calls_again: u64, silent_ends: u64| {
        let report = serde_json::json!({
            "source": "ali1688", "instance": instance, "chunk": 0, "chunks": 1, "reported_at": reported_at,
            "counted_at": reported_at, "day_at": midnight(reported_at), "accounts": [], "closed": true,
            "whole": {"calls_again": calls_again, "silent_ends": silent_ends},
        });
        record(report_key(&source(), instance, 0), &report)
    };
    let yesterday = Timestamp::from_millis(midnight(at(0)).as_millis() - 1);
    let records = [report("a", at(0), 1_200, 2), report("b", at(-1), 5, 0), report("c", yesterday, 100, 7)];
    let view = &views(&known(&records), &configured(), at(1))[0];
    assert_eq!((view.calls_again_today, view.silent_ends_today), (1_205, 2));
    let words = made_again(view);
    assert!(words[0].contains("1,205 calls of today were repeated"), "{words:?}");
    assert!(words[1].contains("2 times today a worker stopped without a last report"), "{words:?}");
    assert_eq!(made_again(&views(&known(&[report("a", at(0), 0, 0)]), &configured(), at(1))[0]), [""; 0]);
}

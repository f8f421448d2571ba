//! Windows as people write them, across midnights, weeks and changes of the clocks.

use proptest::prelude::*;

use super::*;
use crate::quota::{Lease, Limit, Pacing, memory::Memory};

fn read(text: &str) -> Window {
    toml::from_str(text).unwrap()
}

fn at(text: &str) -> Timestamp {
    Timestamp::from_millis(text.parse::<jiff::Timestamp>().unwrap().as_millisecond())
}

fn source() -> SourceName {
    SourceName::new("ali1688").unwrap()
}

const SALE: &str = r#"
name = "double eleven"
from = "2026-11-10T20:00"
to = "2026-11-12T00:00"
zone = "Asia/Shanghai"
pace = 0.5
"#;

const NIGHT: &str = r#"
name = "night"
days = ["fri", "sat"]
from = "22:00"
to = "02:30"
zone = "Europe/Berlin"
pace = 0.25
"#;

#[test]
fn a_window_of_dates_is_meant_in_its_zone_and_comes_once() {
    let sale = [read(SALE)];
    let share = |text: &str| planned(&sale, &source(), at(text));
    let table = [
        ("2026-11-10T11:59:59.999Z", 1.0, Some("2026-11-10T12:00:00Z")),
        ("2026-11-10T12:00:00Z", 0.5, Some("2026-11-11T16:00:00Z")),
        ("2026-11-11T15:59:59.999Z", 0.5, Some("2026-11-11T16:00:00Z")),
        ("2026-11-11T16:00:00Z", 1.0, None),
    ];
    for (when, expected, next) in table {
        let planned = share(when);
        assert_eq!((planned.share.get(), planned.changes_at), (expected, next.map(at)), "{when}");
    }
    let offset = read(&SALE.replace("T20:00\"", "T20:00:00+08:00\"").replace("T00:00\"", "T00:00:00+08:00\""));
    let fixed = read(&SALE.replace("Asia/Shanghai", "+08:00"));
    let now = at("2026-01-01T00:00:00Z");
    assert!(offset.occurrence(now) == sale[0].occurrence(now) && fixed.occurrence(now) == sale[0].occurrence(now));
}

#[test]
fn a_window_gives_the_express_lane_another_share_with_or_without_another_pace() {
    let sale = read(&SALE.replace("pace = 0.5", "pace = 0.5\nexpress_share = 0.8"));
    let express = read(&SALE.replace("pace = 0.5", "express_share = 0.6").replace("11-12T00", "11-11T00"));
    assert_eq!((express.pace(), sale.to_string()), (Share::WHOLE, "0.5 of the pace, 0.8 for express".to_owned()));
    assert_eq!(express.to_string(), "0.6 for express");
    let planned = |calendar: &[Window], text: &str| {
        let planned = planned(calendar, &source(), at(text));
        (planned.share.get(), planned.express_share.map(Share::get))
    };
    let (before, during) = ("2026-11-10T11:59:59.999Z", "2026-11-10T12:00:00Z");
    let both = [express.clone(), sale];
    assert_eq!(planned(&both, before), (1.0, None), "what the source says");
    assert_eq!(planned(&both, during), (0.5, Some(0.8)), "the larger one");
    assert_eq!(planned(&[express], during), (1.0, Some(0.6)));
    assert_eq!(planned(&both[1..], "2026-11-11T16:00:00Z"), (1.0, None), "over");
    assert_eq!(planned(&[read(SALE)], during), (0.5, None), "a window without it says nothing of it");
}

#[test]
fn a_window_of_the_week_goes_over_midnight_and_over_changes_of_the_clocks() {
    let night = read(NIGHT);
    let next = |text: &str| night.occurrence(at(text));
    let both = |begin: &str, end: &str| Some((at(begin), at(end)));
    // A Friday in summer (UTC+2), and the small hours of the Saturday that belong to it.
    let friday = both("2026-07-03T20:00:00Z", "2026-07-04T00:30:00Z");
    for when in ["2026-07-01T12:00:00Z", "2026-07-03T20:00:00Z", "2026-07-04T00:29:59Z"] {
        assert_eq!(next(when), friday, "{when}");
    }
    assert_eq!(next("2026-07-04T00:30:00Z"), both("2026-07-04T20:00:00Z", "2026-07-05T00:30:00Z"));
    assert_eq!(next("2026-07-05T00:30:00Z"), both("2026-07-10T20:00:00Z", "2026-07-11T00:30:00Z"));
    // 02:30 does not exist on 29 March 2026: the window ends an hour later by the wall, at 03:30.
    assert_eq!(next("2026-03-28T22:00:00Z"), both("2026-03-28T21:00:00Z", "2026-03-29T01:30:00Z"));
    // In October it exists twice: the first one counts.
    assert_eq!(next("2026-10-24T21:00:00Z"), both("2026-10-24T20:00:00Z", "2026-10-25T00:30:00Z"));
}

#[test]
fn of_open_windows_the_smallest_share_counts_and_other_sources_have_their_own() {
    let mine =
        SALE.replace("name = \"double eleven\"", "name = \"mine\"\nsources = [\"ali1688\"]").replace("0.5", "0.3");
    let other =
        SALE.replace("name = \"double eleven\"", "name = \"other\"\nsources = [\"amazon\"]").replace("0.5", "0.1");
    let calendar = [read(SALE), read(&mine), read(&other)];
    let planned = planned(&calendar, &source(), at("2026-11-11T00:00:00Z"));
    assert_eq!((planned.share.get(), planned.windows.len()), (0.3, 2));
}

#[test]
fn what_makes_no_sense_is_named() {
    let table = [
        (SALE.replace("2026-11-10T20:00", "2026-11-31T20:00"), "from is \"2026-11-31T20:00\""),
        (SALE.replace("2026-11-10T20:00", "20:00"), "to is \"2026-11-12T00:00\"; give both"),
        (SALE.replace("2026-11-12T00:00", "2026-11-10T20:00"), "not after from"),
        (SALE.replace("Asia/Shanghai", "Asia/Atlantis"), "zone is \"Asia/Atlantis\""),
        (SALE.replace("Asia/Shanghai", "+25:00"), "zone is \"+25:00\""),
        (SALE.replace("Asia/Shanghai", "+é"), "zone is"),
        (SALE.replace("pace = 0.5", "pace = 0.0"), "0 is no share"),
        (SALE.replace("pace = 0.5", "pace = 1.5"), "1.5 is no share"),
        (SALE.replace("pace = 0.5", "pace = 0.5\ndays = [\"mon\"]"), "days are for windows that come again"),
        (SALE.replace("pace = 0.5", "pace = 0.5\nexpress = 0.8"), "unknown field `express`"),
        (SALE.replace("pace = 0.5", "express_share = 1.2"), "1.2 is no share"),
        (SALE.replace("pace = 0.5", ""), "it changes nothing; give pace, express_share, or both"),
        (NIGHT.replace("\"fri\"", "\"friday\""), "unknown variant `friday`"),
        (NIGHT.replace("02:30", "22:00"), "not after from"),
        (NIGHT.replace("02:30", "24:30"), "to is \"24:30\""),
    ];
    for (text, expected) in table {
        let message = toml::from_str::<Window>(&text).unwrap_err().to_string();
        assert!(message.contains(expected), "{message:?} should say {expected:?}");
    }
}

#[test]
fn a_window_is_written_as_it_was_read() {
    for text in [SALE, NIGHT] {
        let window = read(text);
        assert_eq!(read(&toml::to_string(&window).unwrap()), window);
    }
}

#[tokio::test(start_paused = true)]
async fn a_quota_follows_the_calendar_and_comes_back() {
    let limit = Limit::new(100, Duration::from_secs(1), 5).unwrap();
    let memory = Memory::new(vec![Some(limit)], Pacing::default());
    let clock = Clock::simulated(at("2026-11-10T11:59:30Z"));
    let minute = SALE.replace("2026-11-12T00:00", "2026-11-10T20:01");
    let calendar = [read(&format!("{minute}\nexpress_share = 0.9"))];
    let count = async {
        let mut by_half_minute = [0_u32; 4];
        for half_minute in &mut by_half_minute {
            let until = tokio::time::Instant::now() + Duration::from_secs(30);
            while tokio::time::Instant::now() < until {
                if let Lease::Slots(slots) = memory.lease(64).await {
                    *half_minute += u32::try_from(slots.len()).unwrap();
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        by_half_minute
    };
    let source = source();
    let told = std::sync::Mutex::new(Vec::new());
    let express = |share: Option<Share>| {
        let mut told = told.lock().unwrap();
        told.push(share.map(Share::get));
        told.dedup();
    };
    let [before, first, second, after] = tokio::select! {
        counts = count => counts,
        never = follow(&calendar, &source, &memory, express, &clock) => match never {},
    };
    assert_eq!(*told.lock().unwrap(), [None, Some(0.9), None]);
    assert!((2_950..=3_010).contains(&before) && (2_950..=3_010).contains(&after), "{before} {after}");
    assert!((1_480..=1_520).contains(&first) && (1_480..=1_520).contains(&second), "{first} {second}");
}

proptest! {
    #[test]
    fn the_plan_changes_when_it_says_and_not_before(millis in 1_700_000_000_000_i64..1_900_000_000_000) {
        let calendar = [read(SALE), read(NIGHT), read(&NIGHT.replace("22:00", "01:00").replace("Berlin", "Paris"))];
        let now = Timestamp::from_millis(millis);
        let plan = planned(&calendar, &source(), now);
        let change = plan.changes_at.unwrap();
        prop_assert!(change > now);
        let just_before = planned(&calendar, &source(), Timestamp::from_millis(change.as_millis() - 1));
        prop_assert_eq!(just_before.windows, plan.windows.clone());
        prop_assert_ne!(planned(&calendar, &source(), change).windows, plan.windows);
    }
}

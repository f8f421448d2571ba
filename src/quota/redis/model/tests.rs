//! What express requests wait, and what that costs the others.

use super::*;
use crate::{
    quota::{Limit, plan::AccountLimits},
    simulate::limiter::{Limiter, Quota},
};

/// 20 accounts of 10/s: a slot every 5 ms.
fn limits() -> Limits {
    let limit = Limit::new(10, Duration::from_secs(1), 5).unwrap();
    Limits {
        accounts: vec![AccountLimits { limits: vec![limit], ..AccountLimits::default() }; 20],
        ..Limits::default()
    }
}

/// The figures that the promises are about.
#[derive(Debug)]
struct Figures {
    refused: usize,
    /// The share of the quota that was used.
    used: f64,
    operations_per_call: f64,
    /// The share of the calls that were express requests'.
    express: f64,
    p99: Duration,
}

fn figures(name: &str, fleet: &Fleet) -> Figures {
    let mut seen = fleet.run();
    let dice = Dice::seeded(3);
    let mut refused = 0;
    for account in 0..fleet.limits.accounts.len() {
        let mut vendor = Limiter::new(Quota::Bucket { rate: 10.0, burst: 5 }, Duration::ZERO);
        let calls = seen.sent.iter().filter(|call| call.0 == account);
        let mut arrivals: Vec<_> = calls.map(|call| call.1 - START + below(&dice, 10 * MILLI)).collect();
        arrivals.sort_unstable();
        refused += arrivals.iter().filter(|at| !vendor.admit(Duration::from_micros(**at))).count();
    }
    seen.waits.sort_unstable();
    let wait = |percent: usize| {
        let index = (seen.waits.len() * percent).div_ceil(100).saturating_sub(1);
        Duration::from_micros(seen.waits.get(index).copied().unwrap_or_default())
    };
    let calls = (seen.sent.len() - seen.before) as f64;
    let figures = Figures {
        refused,
        used: calls / (200.0 * Duration::from_micros(fleet.span).as_secs_f64()),
        operations_per_call: seen.operations as f64 / calls,
        express: seen.waits.len() as f64 / calls,
        p99: wait(99),
    };
    let (median, missed) = (wait(50), seen.missed);
    println!("{name}: {figures:.4?}, median {median:?}, {missed} slots missed, {} express requests", seen.waits.len());
    assert_eq!(figures.refused, 0, "{name}: {figures:?}");
    figures
}

#[test]
fn over_a_backlog_everywhere_an_express_request_waits_for_milliseconds_and_no_quota_is_lost() {
    for (workers, hop) in [(4, 2), (16, 2), (16, 8)] {
        let fleet = Fleet { hop: hop * MILLI, ..Fleet::new(limits(), workers) };
        let figures = figures(&format!("{workers} workers, words take up to {hop} ms"), &fleet);
        assert!(figures.p99 <= Duration::from_millis(60), "{figures:?}");
        assert!(figures.used >= 0.99, "{figures:?}");
        assert!(figures.operations_per_call <= 0.15, "{figures:?}");
    }
}

#[test]
fn without_passing_on_it_waits_for_seconds_so_these_tests_can_fail() {
    let fleet = Fleet { passes: false, ..Fleet::new(limits(), 16) };
    let figures = figures("16 workers, nothing is passed on", &fleet);
    assert!(figures.p99 >= Duration::from_secs(1), "{figures:?}");
}

/// What a worker leases at once are slots in a row, and then it is the turn of the others. With shorter leases its turn
/// comes sooner, and Redis is asked more often: no length is short enough for express requests and long enough for Redis,
/// which is asked about once for ten calls.
#[test]
fn leases_short_enough_for_express_requests_would_ask_redis_far_too_often() {
    for depth in [2, 4, 6, 8, 12, 16, 24, 48] {
        let fleet = Fleet { passes: false, depth: Some(depth), ..Fleet::new(limits(), 16) };
        let figures = figures(&format!("16 workers, nothing is passed on, {depth} slots ahead"), &fleet);
        let is_quick = figures.p99 <= Duration::from_millis(300);
        assert!(!is_quick || figures.operations_per_call > 0.2, "{depth} slots ahead do both: {figures:?}");
    }
}

#[test]
fn nothing_changes_while_nobody_waits() {
    let fleet = Fleet { express: 0.0, ..Fleet::new(limits(), 16) };
    let figures = figures("16 workers, no express requests", &fleet);
    assert!(figures.used >= 0.99 && figures.operations_per_call <= 0.05, "{figures:?}");
}

#[test]
fn a_worker_without_a_backlog_of_its_own_is_passed_slots_too_and_wastes_none() {
    let fleet = Fleet { backlog: |worker| worker > 0, express_to: |_| 0, ..Fleet::new(limits(), 16) };
    let figures = figures("16 workers, all express requests go to the one without a backlog", &fleet);
    assert!(figures.p99 <= Duration::from_millis(60) && figures.used >= 0.99, "{figures:?}");
}

#[test]
fn a_crowd_of_express_requests_gets_its_share_of_the_fleets_slots_and_the_backlog_the_rest() {
    for (share, to) in [(0.5, 1), (0.2, 1), (0.5, 16), (0.2, 16)] {
        let to: fn(&Dice) -> usize = if to == 1 { |_| 3 } else { |dice| usize::try_from(below(dice, 16)).unwrap() };
        let fleet = Fleet { express: 400.0, express_to: to, share, span: 60 * SECOND, ..Fleet::new(limits(), 16) };
        let figures = figures(&format!("400 express requests a second, share {share}"), &fleet);
        assert!(figures.used >= 0.99, "{figures:?}");
        assert!((figures.express - share).abs() <= 0.02, "{figures:?}");
        assert!(figures.operations_per_call <= 0.2, "{figures:?}");
    }
}

#[test]
fn workers_that_stand_still_now_and_then_cost_nobody_a_refusal() {
    let fleet = Fleet { stalls: Some(10 * SECOND), ..Fleet::new(limits(), 16) };
    let figures = figures("16 workers that stand still", &fleet);
    assert!(figures.used >= 0.98, "{figures:?}");
}

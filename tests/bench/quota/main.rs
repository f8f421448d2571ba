//! Measures how much of a vendor's quota workers use, and what that costs: real calls over the loopback to the
//! simulated gateway, which judges each by its arrival, and slots from a real Redis.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_precision_loss,
    reason = "a benchmark that fails says so by panicking, and its numbers are small"
)]

mod arithmetic;
mod floor;
mod load;
mod process;
mod vendor;

use std::time::Duration;

use clap::Parser;
use weir::quota::{Limit, Pacing};

use self::load::{Demand, Measured, Row, Slots};

/// How much of a quota is used, by how many workers, and what it costs.
#[derive(Parser)]
struct Args {
    /// How long each row is measured, in seconds; 600 for the ten minutes of the promise.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only rows whose name has this in it.
    #[arg(long, default_value = "")]
    row: String,
    /// Redis; by default the one that deploy/local/bench has started.
    #[arg(long, env = "WEIR_TEST_REDIS")]
    redis: String,
    /// What cargo says to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

const COLUMNS: &str = "row                         workers slots   used %    goal  ceiling  refused  missed   calls/s  \
                       ops/call  reserve p50  p99 µs  PING p99  script p50  p99 µs  CPU µs/call";
/// Most operations on Redis for each call, and the longest that a lease may take (99 of 100), as the issue has them.
const OPERATIONS_MAX: f64 = 0.1;
const RESERVE_MAX: Duration = Duration::from_millis(2);

fn main() {
    let args = Args::parse();
    println!("{} s a row, vendor latency 200-500 ms, jitter declared 10 ms, margin 0.1 %", args.seconds);
    println!("used: calls that arrived within the quota, of what the vendor allows; it judges each by its arrival");
    println!("ceiling: what no refusal allows at most; missed: slots that came too late to be used");
    println!(
        "PING: a bare one every 20 ms among the workers, and script: what it took within Redis; a lease is no quicker"
    );
    println!("CPU: of the workers and their HTTP clients, without the vendor's\n");
    let span = Duration::from_secs(args.seconds.max(1));
    // First of all, while the process has nothing else in memory.
    if "10,000 accounts".contains(&args.row) {
        arithmetic::bare();
        arithmetic::run(&args.redis, span.min(Duration::from_secs(20)));
        println!();
    }
    println!("{COLUMNS}");
    for row in rows().iter().filter(|row| row.name.contains(&args.row)) {
        print(row, &load::run(row, &args.redis, span));
    }
}

fn rows() -> Vec<Row> {
    let one = |name, workers, slots| Row {
        name,
        workers,
        slots,
        accounts: 1,
        limit: Limit::new(100, Duration::from_secs(1), 5).expect("a limit"),
        demand: Demand::Endless,
        goal: None,
    };
    let aims = |goal, row| Row { goal: Some(goal), ..row };
    let thousand = Row {
        accounts: 100,
        limit: Limit::new(10, Duration::from_secs(1), 5).expect("a limit"),
        ..one("1,000/s over 100 accounts", 4, Slots::Redis)
    };
    vec![
        one("100/s, bare loop (floor)", 1, Slots::EvenLoop),
        aims(99.5, one("100/s burst 5", 1, Slots::Memory)),
        aims(99.5, one("100/s burst 5", 1, Slots::Redis)),
        aims(99.0, one("100/s burst 5", 4, Slots::Redis)),
        aims(98.0, one("100/s burst 5", 16, Slots::Redis)),
        aims(98.0, Row { demand: Demand::OneOfAll, ..one("100/s, backlog on one of 16", 16, Slots::Redis) }),
        Row { name: "1,000/s, bare loop (floor)", workers: 1, slots: Slots::EvenLoop, ..thousand.clone() },
        aims(99.0, thousand),
    ]
}

/// The share of the quota that no refusal allows at most with the declared jitter (`engine.md`, section 5).
fn ceiling(limit: &Limit) -> f64 {
    let (rate, jitter) = (f64::from(limit.calls) / limit.per.as_secs_f64(), Pacing::default().jitter.as_secs_f64());
    (f64::from(limit.burst) / (1.0 + rate * jitter)).min(1.0)
}

fn print(row: &Row, measured: &Measured) {
    let (seconds, calls) = (measured.span.as_secs_f64(), measured.calls as f64);
    let allowed = f64::from(row.limit.calls) / row.limit.per.as_secs_f64() * f64::from(row.accounts) * seconds;
    let slots = match row.slots {
        Slots::Redis => "Redis",
        Slots::Memory => "memory",
        Slots::EvenLoop => "none",
    };
    let micros = |time: Option<Duration>| time.map_or("-".to_owned(), |time| format!("{}", time.as_micros()));
    let used = 100.0 * measured.admitted as f64 / allowed;
    println!(
        "{:<27} {:>7} {slots:<6} {used:>7.2} {:>7} {:>8.2} {:>8} {:>7} {:>9.1} {:>9.3} {:>12} {:>7} {:>9} {:>11} {:>7} {:>12.0}",
        row.name,
        row.workers,
        row.goal.map_or("-".to_owned(), |goal| format!("{goal:.1}")),
        100.0 * ceiling(&row.limit),
        measured.refused,
        measured.missed,
        calls / seconds,
        measured.operations as f64 / calls.max(1.0),
        micros(measured.reserve(0.5)),
        micros(measured.reserve(0.99)),
        micros(measured.floor.map(|floor| floor.ping_p99)),
        micros(measured.floor.map(|floor| floor.script_p50)),
        micros(measured.floor.map(|floor| floor.script_p99)),
        measured.cpu.as_secs_f64() * 1e6 / calls.max(1.0),
    );
    if row.demand == Demand::OneOfAll {
        let [first, others] = [
            (measured.operations_first, measured.calls_first),
            (measured.operations - measured.operations_first, measured.calls - measured.calls_first),
        ]
        .map(|(operations, calls)| operations as f64 / (calls as f64).max(1.0));
        println!("  operations a call: {first:.3} of the one with the backlog, {others:.3} of those with single calls");
    }
    for missed in goals_missed(row, measured, used) {
        println!("  MISSED: {missed}");
    }
}

/// How much of a lease's time is not the lease's.
fn machine(measured: &Measured) -> String {
    let Some(floor) = measured.floor else { return String::new() };
    let whose = if floor.ping_p99 > RESERVE_MAX { ": this machine does not allow it" } else { "" };
    format!(" (a bare PING in this run {:?}{whose})", floor.ping_p99)
}

/// What the row was to reach and did not.
fn goals_missed(row: &Row, measured: &Measured, used: f64) -> Vec<String> {
    let Some(goal) = row.goal else { return Vec::new() };
    let operations = measured.operations as f64 / (measured.calls as f64).max(1.0);
    let reserve = measured.reserve(0.99).unwrap_or_default();
    let table = [
        (used < goal, format!("{used:.2} % used, at least {goal} %")),
        (measured.refused > 0, format!("{} refused, none", measured.refused)),
        (operations > OPERATIONS_MAX, format!("{operations:.3} operations a call, at most {OPERATIONS_MAX}")),
        (reserve > RESERVE_MAX, format!("reserve p99 {reserve:?}, at most {RESERVE_MAX:?}{}", machine(measured))),
    ];
    table.into_iter().filter(|(is_missed, _)| *is_missed).map(|(_, what)| what).collect()
}

//! What this process counts about itself: every metric with its name and what it tells, for Prometheus at `/metrics`.
//!
//! Counters begin at zero with the process. Labels are names of the configuration and fixed words, never an id of an
//! item or a request, so their number is bounded by the configuration. Names and units as Prometheus recommends
//! (<https://prometheus.io/docs/practices/naming/>): base units, `_total` for what only grows.

use std::{borrow::Cow, sync::LazyLock, time::Duration};

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Metric, Registry, Unit},
};

/// The format of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics of this process.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::register);

/// Upper bounds of histograms in seconds: from a call on the loopback to the longest time-out.
const SECONDS: [f64; 13] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];

type Labels = Vec<(&'static str, Cow<'static, str>)>;
type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// All of them. A family has one series for each combination of labels that has come up.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    role_ready: Family<Labels, Gauge>,
    calls: Family<Labels, Counter>,
    call_items: Family<Labels, Counter>,
    call_time: Histograms,
    outcomes: Family<Labels, Counter>,
    waiting: Family<Labels, Gauge>,
    in_flight: Family<Labels, Gauge>,
    breaker_open: Family<Labels, Gauge>,
    uncommitted: Family<Labels, Gauge>,
    waits_for_commit: Family<Labels, Gauge>,
    kept: Family<Labels, Counter>,
    lost: Family<Labels, Counter>,
    slots: Family<Labels, Counter>,
    budget_spent: Family<Labels, Gauge>,
    cache: Family<Labels, Counter>,
    retry_waiting: Gauge,
    retried: Family<Labels, Counter>,
    retry_lateness: Histogram,
    rows: Family<Labels, Counter>,
    insert_time: Histograms,
    not_taken: Family<Labels, Counter>,
    views_lack: Family<Labels, Counter>,
    sink_bytes: Gauge,
    deleted: Family<Labels, Counter>,
}

/// What the fetch stage of one source is doing now.
#[derive(Clone, Debug)]
pub struct Fetching {
    /// Requests that wait for a slot, by lane.
    waiting: [Gauge; 2],
    /// Calls that have left.
    in_flight: Gauge,
    /// 1 while the source's breaker is open.
    breaker_open: Gauge,
    /// Calls that have ended and are not committed.
    uncommitted: Gauge,
    /// 1 while calls wait for a commit.
    waits_for_commit: Gauge,
    /// Answers that a role kept when it had to begin anew, and that its request came back for.
    pub kept: Counter,
    /// Calls whose answer was lost before it was committed.
    pub lost: Counter,
}

/// What becomes of one account's slots.
#[derive(Clone, Debug)]
pub struct Slots {
    /// Calls left in them.
    pub used: Counter,
    /// Their time had passed.
    pub missed: Counter,
    /// Returned: no request waited.
    pub returned: Counter,
}

/// How the requests of one source were answered.
#[derive(Clone, Debug, Default)]
pub struct Answered {
    /// From memory.
    pub near: Counter,
    /// From Redis.
    pub far: Counter,
    /// By a call that was under way for another request.
    pub shared: Counter,
    /// With something older, since the call failed.
    pub stale: Counter,
    /// By a call of their own.
    pub called: Counter,
}

impl Metrics {
    #[rustfmt::skip]
    fn register() -> Self {
        let mut of = Registrar(Registry::with_prefix("weir"));
        let histogram: fn() -> Histogram = || Histogram::new(SECONDS);
        Self {
            role_ready: of.family("role_ready", "1 while the role is ready; otherwise /ready says what it waits for"),
            calls: of.family("fetch_calls", "Finished calls by outcome: answered, throttled, outage, denied, malformed, bug, no_way (no connection to the vendor), machine (this machine lacked descriptors, ports or memory) or unprocessed (the server did not process it). Expect no throttled ones"),
            call_items: of.family("fetch_call_items", "Items requested by calls; divided by calls: items per call"),
            call_time: of.seconds("fetch_call", "Time from sending a call to the end of its reply", Family::new_with_constructor(histogram)),
            outcomes: of.family("fetch_outcomes", "Outcomes of requests (found, absent, off_shelf, failed, dead, or handed_on to another source), by their origin (call, cache, stale, none)"),
            waiting: of.family("fetch_waiting_requests", "Requests read from Kafka that wait for a slot, by lane"),
            in_flight: of.family("fetch_calls_in_flight", "Calls in flight"),
            breaker_open: of.family("fetch_breaker_open", "1 while the source's breaker is open"),
            uncommitted: of.family("fetch_uncommitted_calls", "Finished calls whose outcomes are not committed yet: they are repeated if the process is killed"),
            waits_for_commit: of.family("fetch_waits_for_commit", "1 while calls are paused because too many outcomes are not committed to Kafka (fetch.at_risk)"),
            kept: of.family("fetch_answers_kept", "Answers kept when the role rejoined its consumer group, and so not called for again"),
            lost: of.family("fetch_calls_lost", "Calls whose answer was lost before its commit, as far as this process knows; they are repeated"),
            slots: of.family("quota_slots", "Leased slots by use: used, missed (their time had passed), returned (no request waited)"),
            budget_spent: of.family("quota_budget_spent", "1 while a source's calls are paused because a budget, such as the day's money, is spent; /ready and `weir quota` say which and until when"),
            cache: of.family("cache_requests", "Requests by what answered them: memory, redis, shared (the call of another request), stale, call"),
            retry_waiting: of.one("retry_waiting_requests", "Requests in memory until they are due; more may wait on the delay topics", Gauge::default()),
            retried: of.family("retry_requests", "Requests handled by retry: again (sent when due), later (written to a delay topic), dead"),
            retry_lateness: of.seconds("retry_lateness", "How late retries were sent after they were due", histogram()),
            rows: of.family("sink_rows", "Rows stored in ClickHouse, by table"),
            insert_time: of.seconds("sink_insert", "Duration of an insert, including the check of its rows if its outcome was unknown", Family::new_with_constructor(histogram)),
            views_lack: of.family("sink_view_blocks_lacking", "Blocks whose rows a materialized view of your own may lack, by view: the log has the statement that fills it"),
            not_taken: of.family("sink_refused_inserts", "Failed inserts by reason: away, unable, schema, login, refused; the block is sent again"),
            sink_bytes: of.one("sink_waiting_bytes", "Bytes of records in memory that wait for their insert", Gauge::default()),
            deleted: of.family("records_deleted_unread", "Offsets that a topic's retention deleted before a role had read them, by topic"),
            registry: of.0,
        }
    }

    /// A role says how it is.
    pub fn role(&self, role: &str, ready: bool) {
        self.role_ready.get_or_create(&vec![("role", role.to_owned().into())]).set(ready.into());
    }

    /// The budgets of a source, which a role works on, are spent or not.
    pub fn budget_spent(&self, source: &str, role: &str, is_spent: bool) {
        let labels = of_source(source, [("role", role.to_owned().into())]);
        self.budget_spent.get_or_create(&labels).set(is_spent.into());
    }

    /// A call has ended; `took` if there was a reply.
    pub fn call(&self, (source, account): (&str, &str), outcome: &'static str, took: Option<Duration>) {
        if let Some(took) = took {
            self.call_time.get_or_create(&of_source(source, [])).observe(took.as_secs_f64());
        }
        let more = [("account", account.to_owned().into()), ("outcome", outcome.into())];
        self.calls.get_or_create(&of_source(source, more)).inc();
    }

    /// A call has asked for so many items.
    pub fn call_items(&self, source: &str, items: usize) {
        self.call_items.get_or_create(&of_source(source, [])).inc_by(items as u64);
    }

    /// A request has come to an end in fetch, which may be the beginning of its retry.
    pub fn outcome(&self, source: &str, outcome: &'static str, via: &str) {
        let more = [("outcome", outcome.into()), ("via", via.to_owned().into())];
        self.outcomes.get_or_create(&of_source(source, more)).inc();
    }

    /// What fetch is doing for a source, whose requests come by these lanes.
    #[must_use]
    pub fn fetching(&self, source: &str, lanes: [&'static str; 2]) -> Fetching {
        let waiting =
            |lane: &'static str| self.waiting.get_or_create_owned(&of_source(source, [("lane", lane.into())]));
        let labels = of_source(source, []);
        Fetching {
            waiting: lanes.map(waiting),
            in_flight: self.in_flight.get_or_create_owned(&labels),
            breaker_open: self.breaker_open.get_or_create_owned(&labels),
            uncommitted: self.uncommitted.get_or_create_owned(&labels),
            waits_for_commit: self.waits_for_commit.get_or_create_owned(&labels),
            kept: self.kept.get_or_create_owned(&labels),
            lost: self.lost.get_or_create_owned(&labels),
        }
    }

    /// The slots of an account.
    #[must_use]
    pub fn slots(&self, source: &str, account: &str) -> Slots {
        let of = |outcome: &'static str| {
            let more = [("account", account.to_owned().into()), ("outcome", outcome.into())];
            self.slots.get_or_create_owned(&of_source(source, more))
        };
        Slots { used: of("used"), missed: of("missed"), returned: of("returned") }
    }

    /// The cache of a source.
    #[must_use]
    pub fn answered(&self, source: &str) -> Answered {
        let of = |by: &'static str| self.cache.get_or_create_owned(&of_source(source, [("by", by.into())]));
        let (near, far, shared) = (of("memory"), of("redis"), of("shared"));
        Answered { near, far, shared, stale: of("stale"), called: of("call") }
    }

    /// So many requests wait in memory for their time.
    pub fn retry_waiting(&self, requests: usize) {
        self.retry_waiting.set(whole(requests));
    }

    /// Retry has done with a request.
    pub fn retried(&self, outcome: &'static str) {
        self.retried.get_or_create(&vec![("outcome", outcome.into())]).inc();
    }

    /// A request was sent so long after it was due.
    pub fn retry_late(&self, late: Duration) {
        self.retry_lateness.observe(late.as_secs_f64());
    }

    /// A try to insert a block has ended, with so many rows there that were not known to be there before.
    pub fn inserted(&self, table: &'static str, rows: usize, took: Duration) {
        let labels = vec![("table", table.into())];
        self.insert_time.get_or_create(&labels).observe(took.as_secs_f64());
        self.rows.get_or_create(&labels).inc_by(rows as u64);
    }

    /// ClickHouse has not taken a block.
    pub fn not_inserted(&self, reason: &'static str) {
        self.not_taken.get_or_create(&vec![("reason", reason.into())]).inc();
    }

    /// A view, `database.name`, may lack the rows of a block that is stored.
    pub fn view_lacks(&self, view: &str) {
        self.views_lack.get_or_create(&vec![("view", view.to_owned().into())]).inc();
    }

    /// So many offsets of a topic were deleted by its retention before they were read.
    pub fn deleted_unread(&self, topic: &str, range: &std::ops::Range<i64>) {
        let count = u64::try_from(range.end.saturating_sub(range.start)).unwrap_or(0);
        self.deleted.get_or_create(&vec![("topic", topic.to_owned().into())]).inc_by(count);
    }

    /// So many bytes wait in the sink.
    pub fn sink_waiting(&self, bytes: usize) {
        self.sink_bytes.set(whole(bytes));
    }

    /// All series in [`CONTENT_TYPE`].
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }
}

impl Fetching {
    /// What it is doing now; `waiting` in the order of the lanes that it was made with.
    pub fn now(&self, waiting: [usize; 2], in_flight: usize, breaker_open: bool) {
        for (gauge, waiting) in self.waiting.iter().zip(waiting) {
            gauge.set(whole(waiting));
        }
        self.in_flight.set(whole(in_flight));
        self.breaker_open.set(breaker_open.into());
    }

    /// So many calls are not committed, and whether others wait for that.
    pub fn risk(&self, uncommitted: usize, waits_for_commit: bool) {
        self.uncommitted.set(whole(uncommitted));
        self.waits_for_commit.set(waits_for_commit.into());
    }
}

/// The labels of something of a source.
fn of_source<const N: usize>(source: &str, more: [(&'static str, Cow<'static, str>); N]) -> Labels {
    [("source", source.to_owned().into())].into_iter().chain(more).collect()
}

fn whole(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Registers what it hands out.
struct Registrar(Registry);

impl Registrar {
    fn one<M: Metric + Clone>(&mut self, name: &str, tells: &str, metric: M) -> M {
        self.0.register(name, tells, metric.clone());
        metric
    }

    fn family<M: Metric + Clone + Default>(&mut self, name: &str, tells: &str) -> M {
        self.one(name, tells, M::default())
    }

    fn seconds<M: Metric + Clone>(&mut self, name: &str, tells: &str, metric: M) -> M {
        self.0.register_with_unit(name, tells, Unit::Seconds, metric.clone());
        metric
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A registry of its own: the process's is shared with all other tests.
    #[test]
    fn each_series_has_its_name_its_labels_and_its_value() {
        let metrics = Metrics::register();
        metrics.role("fetch/shop", true);
        metrics.call(("shop", "a"), "answered", Some(Duration::from_millis(200)));
        metrics.call(("shop", "a"), "throttled", None);
        metrics.budget_spent("shop", "fetch/shop", true);
        metrics.call_items("shop", 40);
        metrics.outcome("shop", "found", "call");
        metrics.fetching("shop", ["express", "bulk"]).now([0, 7], 3, false);
        metrics.slots("shop", "a").missed.inc();
        metrics.answered("shop").far.inc();
        metrics.retried("again");
        metrics.retry_late(Duration::from_millis(60));
        metrics.inserted("observations", 10, Duration::from_millis(30));
        metrics.not_inserted("away");
        metrics.view_lacks("weir.mine");
        let text = metrics.text();
        for line in [
            r#"weir_role_ready{role="fetch/shop"} 1"#,
            r#"weir_fetch_calls_total{source="shop",account="a",outcome="answered"} 1"#,
            r#"weir_fetch_calls_total{source="shop",account="a",outcome="throttled"} 1"#,
            r#"weir_quota_budget_spent{source="shop",role="fetch/shop"} 1"#,
            r#"weir_fetch_call_items_total{source="shop"} 40"#,
            r#"weir_fetch_call_seconds_count{source="shop"} 1"#,
            r#"weir_fetch_outcomes_total{source="shop",outcome="found",via="call"} 1"#,
            r#"weir_fetch_waiting_requests{source="shop",lane="bulk"} 7"#,
            r#"weir_fetch_calls_in_flight{source="shop"} 3"#,
            r#"weir_quota_slots_total{source="shop",account="a",outcome="missed"} 1"#,
            r#"weir_cache_requests_total{source="shop",by="redis"} 1"#,
            r#"weir_retry_requests_total{outcome="again"} 1"#,
            r#"weir_retry_lateness_seconds_bucket{le="0.1"} 1"#,
            r#"weir_sink_rows_total{table="observations"} 10"#,
            r#"weir_sink_refused_inserts_total{reason="away"} 1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn alerts_ask_only_for_series_that_there_are() {
        let rules = include_str!("../../deploy/prometheus/weir.rules.yml");
        let words = rules.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        let asked: Vec<&str> = words.filter_map(|word| word.strip_prefix("weir_")).collect();
        assert!(asked.len() > 5, "{asked:?}");
        let (names, _) = include_str!("metrics.rs").split_once("#[cfg(test)]").unwrap();
        for name in asked {
            let name = name.trim_end_matches("_total");
            assert!(names.contains(&format!("(\"{name}\", ")), "no metric is called {name}");
        }
    }
}

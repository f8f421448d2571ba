//! The steps of a replay or redrive: count, ask for confirmation, run, print the result.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    super::{
        elsewhere::expect_table,
        exit::{Ended, Exit},
        piece::{Bar, Told, confirm, in_tables},
        terminal::{agree, counted, grouped, note, say, spoken},
    },
    Order,
};
use crate::{
    kafka::{
        Job, Scan, logs,
        scan::{self, Bounds, Span},
    },
    message::envelope::Kind,
    replay::{
        ask::{Asked, Redriven},
        into::Into,
        plan::{Mark, Offsets, Plan, Unfinished},
        requests::{self, Asking},
        tables::{self, Pouring, Target},
        when::Edge,
    },
    runtime::clock::{Clock, Dice},
    store::{Route, Store, present::Place},
    topics::{Groups, Topic, Topics},
};

/// What is to be read of one topic.
struct Part<'a> {
    topic: &'a Topic,
    spans: Vec<Span>,
}

/// What a run has come to, whatever its target.
#[derive(Default)]
struct Sum {
    offsets: u64,
    tables: tables::Tally,
    requests: requests::Tally,
    /// What has been sent, of all topics together.
    asked: Asked,
}

impl Sum {
    const fn is_idle(&self) -> bool {
        self.tables.inserted == 0 && self.requests.sent == 0
    }
}

impl Order<'_> {
    pub(super) async fn carry_out(self, stop: &CancellationToken) -> anyhow::Result<Exit> {
        let (consent, kafka) = (self.consent, &self.config.kafka);
        self.expect_target().await?;
        let names = self.names();
        let progress = scan::committed(kafka, &self.group, &names).await?;
        let progress: Vec<_> = progress.into_iter().filter_map(|(partition, at)| Some((partition, at?))).collect();
        let unfinished = Unfinished::of(&progress).filter(|_| !consent.restart);
        let plan = if let Some(unfinished) = &unfinished {
            Plan { spans: unfinished.spans.clone(), ..Plan::default() }
        } else {
            self.expect_sight().await?;
            self.plan().await?
        };
        tell(&plan, unfinished.is_some(), self.topics.iter().any(|topic| topic.kind == Kind::Result));
        if plan.spans.is_empty() && unfinished.is_none() {
            say("The range has no records")?;
            return Ok(Exit::Done);
        }
        let resumed = unfinished.as_ref().map(|unfinished| unfinished.run.as_str());
        if !consent.yes {
            let Some(counted) = self.pass(&plan, None, resumed, stop).await? else { return Ok(Exit::Interrupted) };
            say(&self.words(&counted, Told::Before))?;
            if consent.dry_run || counted.is_idle() {
                return Ok(Exit::Done);
            }
            if !confirm(stop).await? {
                return Ok(Exit::Interrupted);
            }
        }
        let job = Job::open(kafka, &self.writer, &self.group).await?;
        let run = match resumed {
            Some(run) => run.to_owned(),
            None => begin(&job, &plan).await?,
        };
        let since = Instant::now();
        let Some(sum) = self.pass(&plan, Some((&job, run)), resumed, stop).await? else {
            say("Interrupted. Run the same command again to continue")?;
            return Ok(Exit::Interrupted);
        };
        job.forget().await?;
        say(&format!("{}, in {}", self.words(&sum, Told::After), spoken(since.elapsed())))?;
        Ok(Exit::Done)
    }

    /// Refuses to redrive what may have been redriven without a trace.
    async fn expect_sight(&self) -> anyhow::Result<()> {
        let is_redrive = self.into == Into::Requests && self.topics.iter().any(|topic| topic.kind == Kind::DeadLetter);
        let Some(Edge::Time(from)) = self.from.as_ref().filter(|_| is_redrive) else { return Ok(()) };
        let keep = self.config.topics.keep_requests;
        // As far as a redrive looks back by itself, which is a moment ago.
        let since = Clock::System.now().before(keep + Duration::from_secs(60));
        if *from >= since {
            return Ok(());
        }
        let names: Vec<_> = self.request_topics().map(|topic| topic.name).collect();
        if scan::bounds(&self.config.kafka, &names).await?.iter().all(|bounds| bounds.low == 0) {
            return Ok(());
        }
        let keep = spoken(keep);
        Err(Ended::usage(format!(
            "--from {from} is before the oldest requests on Kafka ([topics] keep_requests is {keep}), so it is unknown \
             which dead letters of that time were redriven already: they would be sent, and paid for, again. Leave \
             --from out, or give a later time"
        ))
        .into())
    }

    fn names(&self) -> Vec<String> {
        self.topics.iter().map(|topic| topic.name.clone()).collect()
    }

    async fn plan(&self) -> anyhow::Result<Plan> {
        let (kafka, names) = (&self.config.kafka, self.names());
        let bounds = scan::bounds(kafka, &names).await?;
        let from = self.resolve(self.from.as_ref(), &bounds).await?;
        let to = self.resolve(self.to.as_ref(), &bounds).await?;
        let ceiling: Option<Offsets> = if self.into == Into::Tables {
            let sink = Groups::new(&kafka.group_prefix).sink();
            let stored = scan::committed(kafka, &sink, &names).await?;
            Some(stored.into_iter().filter_map(|(partition, at)| Some((partition, at?.offset))).collect())
        } else {
            None
        };
        Ok(Plan::new(&bounds, from.as_ref(), to.as_ref(), ceiling.as_ref()))
    }

    async fn resolve(&self, edge: Option<&Edge>, bounds: &[Bounds]) -> anyhow::Result<Option<Offsets>> {
        let names = self.names();
        Ok(match edge {
            None => None,
            Some(Edge::Time(time)) => {
                Some(scan::at_time(&self.config.kafka, &names, *time).await?.into_iter().collect::<HashMap<_, _>>())
            }
            Some(Edge::Offsets(offsets)) => {
                let topic: Arc<str> = names[0].as_str().into();
                let there = |number: &i32| bounds.iter().any(|bounds| bounds.partition.number == *number);
                if let Some(number) = offsets.keys().find(|number| !there(number)) {
                    let count = bounds.len();
                    return Err(Ended::usage(format!(
                        "{topic} has no partition {number}: it has {count}, numbered from 0"
                    ))
                    .into());
                }
                let at = |(number, offset): (&i32, &i64)| {
                    (crate::kafka::Partition { topic: topic.clone(), number: *number }, *offset)
                };
                Some(offsets.iter().map(at).collect())
            }
        })
    }

    /// Reads everything once; `None` if it was interrupted. `resumed`: the run that this one goes on with.
    async fn pass(
        &self,
        plan: &Plan,
        job: Option<(&Job, String)>,
        resumed: Option<&str>,
        stop: &CancellationToken,
    ) -> anyhow::Result<Option<Sum>> {
        let mut sum = Sum::default();
        if let Some(run) = resumed.filter(|_| self.into == Into::Requests) {
            for topic in self.request_topics() {
                sum.asked.read(&self.config.kafka, &topic, run).await?;
            }
        }
        let mut bar = Bar::new(plan.length());
        let of = |topic: &Topic| plan.spans.iter().filter(|s| *s.partition.topic == *topic.name).cloned().collect();
        let parts = self.topics.iter().map(|topic| Part { topic, spans: of(topic) });
        for part in parts {
            let done = tokio::select! {
                done = self.pass_topic(&part, job.clone(), &mut bar, &mut sum) => done,
                () = stop.cancelled() => {
                    bar.clear();
                    return Ok(None);
                }
            };
            done?;
        }
        bar.clear();
        Ok(Some(sum))
    }

    async fn pass_topic(
        &self,
        Part { topic, spans }: &Part<'_>,
        job: Option<(&Job, String)>,
        bar: &mut Bar,
        sum: &mut Sum,
    ) -> anyhow::Result<()> {
        let (config, route) = (self.config, Route::from(*topic));
        let before = sum.offsets;
        let scan = Scan::open(&config.kafka, spans.clone())?;
        let mut moved = |offsets: u64, what: u64| bar.show(before + offsets, what);
        if self.into == Into::Requests {
            let topics = Topics::new(config.topics.clone());
            let redriven = self.redriven(topic.kind).await?;
            let (filter, clock, dice) = (&self.filter, Clock::System, Dice::random());
            let asking = Asking { route: &route, filter, redriven: &redriven, topics: &topics, job, clock, dice };
            let tally = asking.run(scan, spans, &mut sum.asked, |tally| moved(tally.offsets, tally.sent)).await?;
            sum.offsets += tally.offsets;
            sum.requests.add(&tally);
        } else {
            let (store, place) = self.target(topic.kind)?;
            let filter = Arc::new(self.filter.clone());
            let names = logs::names(&config.kafka, std::slice::from_ref(&topic.name)).await?;
            let pouring = Pouring { target: Target { store, place, names }, route: Arc::new(route), filter, job };
            let tally = pouring.run(scan, spans, |tally| moved(tally.offsets, tally.inserted)).await?;
            sum.offsets += tally.offsets;
            sum.tables.add(&tally);
        }
        Ok(())
    }

    fn target(&self, kind: Kind) -> anyhow::Result<(Store, Place)> {
        let mut clickhouse = self.config.clickhouse.clone();
        let mut place = Place::of(kind);
        if let Into::Elsewhere { database, table } = &self.into {
            clickhouse.database.clone_from(database);
            if let Some(table) = table {
                place = Place { table: table.clone() };
            }
        }
        Ok((Store::connect(&clickhouse)?, place))
    }

    async fn expect_target(&self) -> anyhow::Result<()> {
        let (Into::Elsewhere { database, .. }, Some(topic)) = (&self.into, self.topics.first()) else { return Ok(()) };
        let (store, place) = self.target(topic.kind)?;
        expect_table(&store, database, &place.table, topic.kind).await
    }

    /// Which dead letters have been sent again, as the request topics show.
    async fn redriven(&self, kind: Kind) -> anyhow::Result<Redriven> {
        let mut redriven = Redriven::default();
        if kind != Kind::DeadLetter {
            return Ok(redriven);
        }
        for topic in self.request_topics() {
            redriven.read(&self.config.kafka, &topic, Clock::System.now()).await?;
        }
        Ok(redriven)
    }

    /// Of all sources, also where --source says which are meant.
    fn request_topics(&self) -> impl Iterator<Item = Topic> {
        let topics = Topics::new(self.config.topics.clone()).rows(&self.config.source_names());
        topics.into_iter().filter(|topic| topic.kind == Kind::Request)
    }

    fn words(&self, sum: &Sum, told: Told) -> String {
        if self.into == Into::Requests {
            let requests::Tally { sent, reasons, skipped, .. } = &sum.requests;
            let reasons: Vec<_> =
                reasons.iter().map(|(reason, count)| format!("{} {reason}", grouped(*count))).collect();
            let reasons = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
            let skipped = skipped.iter().map(|(skip, count)| format!("; {} {}", grouped(*count), skip.words()));
            let skipped = skipped.collect::<Vec<_>>().concat();
            return format!("{} {} sent{reasons}{skipped}", counted(*sent, "request"), told.verb(*sent));
        }
        let tables::Tally { meant, there, inserted, rowless, .. } = sum.tables;
        let unreadable = counted(rowless, "unreadable record");
        let have = agree(rowless, "has", "have");
        let rowless = if rowless > 0 { format!("; {unreadable} {have} no row in this table") } else { String::new() };
        in_tables("record", [meant, there, inserted], &self.into, told) + &rowless
    }
}

/// Says what of the piece is left out.
fn tell(plan: &Plan, resumes: bool, has_json: bool) {
    let (left, are) = (counted(plan.length(), "offset"), agree(plan.length(), "is", "are"));
    if resumes {
        note(&format!("Continuing an interrupted run: {left} {are} left (--restart starts over)"));
    }
    if plan.gone > 0 {
        let stored = if has_json { "; `--from-table observations` takes stored rows" } else { "" };
        let have = agree(plan.gone, "has", "have");
        note(&format!("{} of this range {have} been deleted from Kafka{stored}", counted(plan.gone, "offset")));
    }
    // Each partition may end with the mark of a transaction, which is no record.
    if plan.ahead > plan.spans.len() as u64 {
        let are = agree(plan.ahead, "is", "are");
        note(&format!("{} {are} left to the sink, which has not stored them yet", counted(plan.ahead, "offset")));
    }
}

/// Names a run, and writes its spans down where the next one finds them.
async fn begin(job: &Job, plan: &Plan) -> anyhow::Result<String> {
    let run = uuid::Uuid::now_v7().simple().to_string();
    let mark = |span: &Span| Mark { run: run.clone(), to: span.range.end }.at(span.range.start);
    job.insist(Vec::new(), plan.spans.iter().map(|span| (span.partition.clone(), mark(span))).collect()).await?;
    Ok(run)
}

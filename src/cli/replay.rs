//! `weir replay` and `weir redrive`: a piece of a topic once more into tables, or back to requests.

use std::{collections::HashMap, sync::Arc};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    elsewhere::expect_table,
    exit::{Ended, Exit},
    piece::{Bar, Consent, EMPTY_PIECE, PieceArgs, Which, confirm, name},
    rebuild,
    terminal::{grouped, note, say, spoken},
};
use crate::{
    config::Config,
    kafka::{
        Job, Scan,
        scan::{self, Bounds, Span},
    },
    message::envelope::Kind,
    replay::{
        ask::{Asked, Redriven},
        filter::Filter,
        into::Into,
        plan::{Mark, Offsets, Plan, Unfinished},
        requests::{self, Asking},
        tables::{self, Pouring, Target},
        when::{Edge, WhenError},
    },
    runtime::clock::{Clock, Dice, Timestamp},
    sink::{Route, Store, present::Place},
    topics::{EXPRESS, Groups, Topic, Topics},
};

pub(super) const LONG_ABOUT: &str = "\
Pour a piece of a topic once more into tables, or send it back to requests.

Into tables: what is there stays, what is missing is inserted; a row is known by the topic, partition and offset of its \
record, so a run may be repeated, interrupted and resumed, and the tables are the same. Into the sink's own tables go \
only records that the sink has passed; the others are its own to store.

To requests: each id is asked for again, under its own id, by a call (max_age 0), at the pace of the quota as always; \
once in a run, however often it stands on the topic. `weir redrive` is the short form for dead letters.

First all is counted and shown, and asked about; --yes does not ask. How far a run has come is kept in Kafka, in the \
group <prefix>.replay.<name made of the arguments>: the same command goes on where it was interrupted.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir replay --topic results --dry-run                         # what is missing in the tables?
  weir replay --topic results --from \"2 days ago\" --yes
  weir replay --topic failures --from 0:1200 --to 0:1300        # 1300 is not included
  WEIR_CLICKHOUSE__DATABASE=trial weir schema apply             # makes another database
  weir replay --topic results --into trial                      # … and pours into it
  weir replay --topic requests --batch monday --into requests   # ask for a batch once more
  weir replay --from-table observations --into rebuilt          # from stored JSON, not Kafka";

pub(super) const REDRIVE_ABOUT: &str = "\
Send dead letters back to requests.

Each is asked for anew under its own request id: its attempts begin from none, what calls came to before stays with it, \
and the dead letter counts no longer once the request has another end. A dead letter is sent once, however often this \
is run. Those of records that could not be read are left out: nobody knows what to ask for. So are those that somebody \
has cancelled, unless --reason says so.

Looks back as far as requests are kept on Kafka ([topics] keep_requests), since what was redriven is seen there.";

pub(super) const REDRIVE_EXAMPLES: &str = "\
Examples:
  weir redrive --dry-run                                    # how many are there to send?
  weir redrive --reason exhausted --class outage --yes      # what died of an outage
  weir redrive --reason cancelled --batch monday            # what was cancelled, after all
  weir redrive --batch monday --item 610947572360";

/// `weir replay`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which topic.
    #[arg(long, value_enum, required_unless_present = "from_table", conflicts_with = "from_table")]
    topic: Option<Which>,
    /// Take the rows of this table instead, and read the columns from their stored JSON once more: observations.
    #[arg(long, value_name = "TABLE")]
    from_table: Option<String>,
    /// Where to: tables (the sink's own), DATABASE, DATABASE.TABLE, or requests.
    #[arg(long, default_value = "tables")]
    into: Into,
    #[command(flatten)]
    piece: PieceArgs,
    /// Of requests, only those of the express lane. Offsets without it are those of the other one.
    #[arg(long)]
    express: bool,
    #[command(flatten)]
    consent: Consent,
}

/// `weir redrive`
#[derive(Debug, clap::Args)]
pub struct RedriveArgs {
    #[command(flatten)]
    piece: PieceArgs,
    #[command(flatten)]
    consent: Consent,
}

/// A run, as the command line orders it.
struct Order<'a> {
    config: &'a Config,
    topics: Vec<Topic>,
    filter: Filter,
    from: Option<Edge>,
    to: Option<Edge>,
    into: Into,
    /// What the progress is found by.
    group: String,
    /// The transactional id.
    writer: String,
    consent: Consent,
}

pub(super) async fn run(args: Args, config: &Config, stop: &CancellationToken) -> anyhow::Result<Exit> {
    if let Some(source) = &args.piece.source {
        super::enqueue::known_source(config, source)?;
    }
    let Some(which) = args.topic else {
        let table = args.from_table.unwrap_or_default();
        return rebuild::run(&table, &args.into, &args.piece, args.consent, config, stop).await;
    };
    if args.express && which != Which::Requests {
        return Err(Ended::usage("only requests have an express lane").into());
    }
    let order = order((which, args.express), args.into, &args.piece, args.consent, config)?;
    order.carry_out(stop).await
}

pub(super) async fn redrive(args: RedriveArgs, config: &Config, stop: &CancellationToken) -> anyhow::Result<Exit> {
    if let Some(source) = &args.piece.source {
        super::enqueue::known_source(config, source)?;
    }
    let mut order = order((Which::Dead, false), Into::Requests, &args.piece, args.consent, config)?;
    let kept = config.topics.keep_requests;
    let now = Clock::System.now().as_millis();
    let since = Timestamp::from_millis(now.saturating_sub(i64::try_from(kept.as_millis()).unwrap_or(i64::MAX)));
    order.from.get_or_insert(Edge::Time(since));
    order.carry_out(stop).await
}

fn order<'a>(
    (which, express): (Which, bool),
    into: Into,
    piece: &PieceArgs,
    consent: Consent,
    config: &'a Config,
) -> anyhow::Result<Order<'a>> {
    let kind = which.kind();
    let into = into.of(kind, &config.clickhouse.database).map_err(Ended::usage)?;
    check(kind, &into, piece)?;
    let mut topics: Vec<Topic> = Topics::new(config.topics.clone())
        .rows(&config.source_names())
        .into_iter()
        .filter(|topic| topic.kind == kind)
        .filter(|topic| topic.source.is_none() || piece.source.is_none() || topic.source == piece.source)
        .filter(|topic| !express || topic.name.ends_with(EXPRESS))
        .collect();
    let edge = |text: &Option<String>| -> Result<Option<Edge>, WhenError> {
        text.as_deref().map(|text| Edge::parse(text, Clock::System.now())).transpose()
    };
    let usage = |error: WhenError| Ended::usage(error.to_string());
    let (from, to) = (edge(&piece.from).map_err(usage)?, edge(&piece.to).map_err(usage)?);
    if let (Some(from), Some(to)) = (&from, &to)
        && from.leaves_nothing_before(to)
    {
        return Err(Ended::usage(EMPTY_PIECE).into());
    }
    let by_offset = [&from, &to].iter().any(|edge| matches!(edge, Some(Edge::Offsets(_))));
    if by_offset && !express {
        topics.retain(|topic| !topic.name.ends_with(EXPRESS));
    }
    if by_offset && topics.len() != 1 {
        return Err(Ended::usage("offsets are of one topic: name the --source too").into());
    }
    let groups = Groups::new(&config.kafka.group_prefix);
    let name = if express { name(&(which, piece, &into, "express")) } else { name(&(which, piece, &into)) };
    // Redrives of any kind exclude each other: they look at what has been redriven before.
    let writer = if kind == Kind::DeadLetter && into == Into::Requests { "redrive" } else { &name };
    let (group, writer) = (groups.replay(&name), groups.replay(writer));
    Ok(Order { config, topics, filter: piece.filter(), from, to, into, group, writer, consent })
}

fn check(kind: Kind, into: &Into, piece: &PieceArgs) -> Result<(), Ended> {
    if matches!(kind, Kind::Result | Kind::Change) && *into == Into::Requests {
        return Err(Ended::usage(
            "results and changes do not say with which parameters was asked for: replay --topic requests instead",
        ));
    }
    if piece.reason.is_some() && kind != Kind::DeadLetter {
        return Err(Ended::usage("only dead letters have a --reason"));
    }
    if piece.class.is_some() && !matches!(kind, Kind::DeadLetter | Kind::Failure) {
        return Err(Ended::usage("only failures and dead letters have a --class"));
    }
    Ok(())
}

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
    async fn carry_out(self, stop: &CancellationToken) -> anyhow::Result<Exit> {
        let (consent, kafka) = (self.consent, &self.config.kafka);
        self.expect_target().await?;
        let names = self.names();
        let progress = scan::committed(kafka, &self.group, &names).await?;
        let progress: Vec<_> = progress.into_iter().filter_map(|(partition, at)| Some((partition, at?))).collect();
        let unfinished = Unfinished::of(&progress).filter(|_| !consent.restart);
        let plan = match &unfinished {
            Some(unfinished) => Plan { spans: unfinished.spans.clone(), ..Plan::default() },
            None => self.plan().await?,
        };
        tell(&plan, unfinished.is_some(), self.topics.iter().any(|topic| topic.kind == Kind::Result));
        if plan.spans.is_empty() && unfinished.is_none() {
            say("There is nothing to read in this piece")?;
            return Ok(Exit::Done);
        }
        let resumed = unfinished.as_ref().map(|unfinished| unfinished.run.as_str());
        if !consent.yes {
            let Some(counted) = self.pass(&plan, None, resumed, stop).await? else { return Ok(Exit::Interrupted) };
            say(&self.words(&counted, "would be"))?;
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
            say("Interrupted. The same command goes on where this one stopped")?;
            return Ok(Exit::Interrupted);
        };
        job.forget().await?;
        say(&format!("{}, in {}", self.words(&sum, "were"), spoken(since.elapsed())))?;
        Ok(Exit::Done)
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
                    return Err(Ended::usage(format!("{topic} has no partition {number}, but {count}, from 0")).into());
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
            let pouring = Pouring { target: Target { store, place }, route: Arc::new(route), filter, job };
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
            redriven.read(&self.config.kafka, &topic).await?;
        }
        Ok(redriven)
    }

    /// Of all sources, also where --source says which are meant.
    fn request_topics(&self) -> impl Iterator<Item = Topic> {
        let topics = Topics::new(self.config.topics.clone()).rows(&self.config.source_names());
        topics.into_iter().filter(|topic| topic.kind == Kind::Request)
    }

    fn words(&self, sum: &Sum, were: &str) -> String {
        if self.into == Into::Requests {
            let requests::Tally { sent, reasons, skipped, .. } = &sum.requests;
            let reasons: Vec<_> =
                reasons.iter().map(|(reason, count)| format!("{} {reason}", grouped(*count))).collect();
            let reasons = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
            let skipped = skipped.iter().map(|(skip, count)| format!("; {} {}", grouped(*count), skip.words()));
            let skipped = skipped.collect::<Vec<_>>().concat();
            return format!("{} requests {were} sent{reasons}{skipped}", grouped(*sent));
        }
        let tables::Tally { meant, there, inserted, rowless, .. } = sum.tables;
        let rowless = match rowless {
            0 => String::new(),
            _ => format!("; {} unreadable records have no row here", grouped(rowless)),
        };
        let [meant, there, inserted] = [meant, there, inserted].map(grouped);
        format!("Of {meant} records {there} are in {}; {inserted} {were} inserted{rowless}", self.into)
    }
}

/// Says what of the piece is left out.
fn tell(plan: &Plan, resumes: bool, has_json: bool) {
    let left = grouped(plan.length());
    if resumes {
        note(&format!("Going on with an interrupted run: {left} offsets are left (--restart begins anew)"));
    }
    if plan.gone > 0 {
        let stored = if has_json { "; `--from-table observations` takes stored rows" } else { "" };
        note(&format!("{} offsets of this piece have been deleted from Kafka{stored}", grouped(plan.gone)));
    }
    // Each partition may end with the mark of a transaction, which is no record.
    if plan.ahead > plan.spans.len() as u64 {
        note(&format!("{} offsets are the sink's own to store: it has not come that far", grouped(plan.ahead)));
    }
}

/// Names a run, and writes its spans down where the next one finds them.
async fn begin(job: &Job, plan: &Plan) -> anyhow::Result<String> {
    let run = uuid::Uuid::now_v7().simple().to_string();
    let mark = |span: &Span| Mark { run: run.clone(), to: span.range.end }.at(span.range.start);
    job.insist(Vec::new(), plan.spans.iter().map(|span| (span.partition.clone(), mark(span))).collect()).await?;
    Ok(run)
}

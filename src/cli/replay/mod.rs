//! `weir replay` and `weir redrive`: re-insert part of a topic into tables, or send it back to requests.

mod course;

use tokio_util::sync::CancellationToken;

use super::{
    exit::{Ended, Exit},
    piece::{Consent, EMPTY_PIECE, PieceArgs, Which, name},
    rebuild,
};
use crate::{
    config::Config,
    message::envelope::Kind,
    replay::{
        filter::Filter,
        into::Into,
        when::{Edge, WhenError},
    },
    runtime::clock::Clock,
    topics::{EXPRESS, Groups, Topic, Topics},
};

pub(super) const LONG_ABOUT: &str = "\
Re-insert part of a topic into the tables, or send it back to requests.

Into tables: existing rows stay, missing ones are inserted; a row is identified by the topic, partition and offset of \
its record, so a run may be repeated, interrupted and resumed with the same result. Records that the sink has not \
reached yet are left to it.

Into requests: each request is sent again under its own id, and answered by a call (max_age 0) within the quota; once \
per run, however often it is on the topic. `weir redrive` is the short form for dead letters.

The records are counted first, and you are asked for confirmation unless --yes is given. The progress is committed to \
Kafka in the consumer group <prefix>.replay.<name derived from the arguments>: the same command continues an \
interrupted run.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir replay --topic results --dry-run                         # which rows are missing?
  weir replay --topic results --from \"2 days ago\" --yes
  weir replay --topic failures --from 0:1200 --to 0:1300        # 1300 is not included
  WEIR_CLICKHOUSE__DATABASE=trial weir schema apply             # creates another database
  weir replay --topic results --into trial                      # … and inserts into it
  weir replay --topic requests --batch monday --into requests   # request a batch again
  weir replay --from-table observations --into rebuilt          # from stored JSON, not Kafka";

pub(super) const REDRIVE_ABOUT: &str = "\
Send dead letters back to requests.

Each request is sent again under its own id: its attempts start from zero, its history is kept, and the dead letter no \
longer counts once the request has a new outcome. A dead letter is sent once, however often this is run. Unreadable \
records are skipped. So are cancelled requests, unless --reason cancelled is given.

Reaches back as far as requests are kept on Kafka ([topics] keep_requests), since that is where earlier redrives are \
looked up; an earlier --from is refused.";

pub(super) const REDRIVE_EXAMPLES: &str = "\
Examples:
  weir redrive --dry-run                                    # how many would be sent?
  weir redrive --reason exhausted --class outage --yes      # those that failed with outages
  weir redrive --reason cancelled --batch monday            # cancelled requests
  weir redrive --batch monday --item 610947572360";

/// `weir replay`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which topic.
    #[arg(long, value_enum, required_unless_present = "from_table", conflicts_with = "from_table")]
    topic: Option<Which>,
    /// Read the rows of this table instead, and parse the columns from their stored JSON again: observations.
    #[arg(long, value_name = "TABLE")]
    from_table: Option<String>,
    /// The target: tables (the sink's own), DATABASE, DATABASE.TABLE, or requests.
    #[arg(long, default_value = "tables")]
    into: Into,
    #[command(flatten)]
    piece: PieceArgs,
    /// Only express requests. Without it, offsets are those of the normal request topic.
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
        super::arguments::known_source(config, source)?;
    }
    let Some(which) = args.topic else {
        let table = args.from_table.unwrap_or_default();
        return rebuild::run(&table, &args.into, &args.piece, args.consent, config, stop).await;
    };
    if args.express && which != Which::Requests {
        return Err(Ended::usage("--express is only for requests").into());
    }
    let order = order((which, args.express), args.into, &args.piece, args.consent, config)?;
    order.carry_out(stop).await
}

pub(super) async fn redrive(args: RedriveArgs, config: &Config, stop: &CancellationToken) -> anyhow::Result<Exit> {
    if let Some(source) = &args.piece.source {
        super::arguments::known_source(config, source)?;
    }
    let mut order = order((Which::Dead, false), Into::Requests, &args.piece, args.consent, config)?;
    let kept = config.topics.keep_requests;
    order.from.get_or_insert_with(|| Edge::Time(Clock::System.now().before(kept)));
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
        return Err(Ended::usage("offsets belong to one topic: give --source too").into());
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
            "results and changes do not hold the parameters of their request: replay --topic requests instead",
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

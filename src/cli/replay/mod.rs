//! `weir replay` and `weir redrive`: a piece of a topic once more into tables, or back to requests.

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

Looks back as far as requests are kept on Kafka ([topics] keep_requests), since what was redriven is seen there; an \
earlier --from is refused.";

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
        super::arguments::known_source(config, source)?;
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

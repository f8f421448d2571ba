//! Arguments that `replay` and `redrive` share (range, filters, confirmation), and their progress display.

use std::{
    collections::BTreeSet,
    io::{BufRead, IsTerminal},
};

use clap::ValueEnum as _;
use sha1::{Digest as _, Sha1};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    exit::Ended,
    terminal::{Progress, Rate, agree, counted, grouped, note},
};
use crate::{
    message::{BatchId, Class, ItemId, Reason, SourceName, envelope::Kind},
    replay::{filter::Filter, into::Into},
};

/// What is replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Which {
    /// The requests of all sources, or of --source.
    Requests,
    /// The results.
    Results,
    /// The failed calls.
    Failures,
    /// The changes of watched columns.
    Changes,
    /// The dead letters.
    Dead,
}

impl Which {
    pub(super) const fn kind(self) -> Kind {
        match self {
            Self::Requests => Kind::Request,
            Self::Results => Kind::Result,
            Self::Failures => Kind::Failure,
            Self::Changes => Kind::Change,
            Self::Dead => Kind::DeadLetter,
        }
    }

    /// Where records of this kind are; `None` if they are not replayed.
    pub(super) fn of(kind: Kind) -> Option<Self> {
        Self::value_variants().iter().copied().find(|which| which.kind() == kind)
    }
}

pub(super) const EMPTY_PIECE: &str = "the range is empty: --to must be after --from, and is not included";

#[derive(Clone, Debug, clap::Args)]
pub(super) struct PieceArgs {
    /// Start here: an RFC 3339 time, a day, "2 days ago", 2d, or PARTITION:OFFSET,…
    #[arg(long, value_name = "WHEN")]
    pub(super) from: Option<String>,
    /// Stop before this; same forms as --from.
    #[arg(long, value_name = "WHEN")]
    pub(super) to: Option<String>,
    /// Only records of this source.
    #[arg(long, value_name = "NAME")]
    pub(super) source: Option<SourceName>,
    /// Only records of this batch.
    #[arg(long, value_name = "NAME")]
    pub(super) batch: Option<BatchId>,
    /// Only failures of this class: throttled, outage, denied, malformed, bug; for dead letters, the class of the last
    /// failure.
    #[arg(long, value_name = "CLASS", value_parser = word::<Class>)]
    pub(super) class: Option<Class>,
    /// Only dead letters of this reason: exhausted, permanent, expired, cancelled, budget, invalid.
    #[arg(long, value_name = "REASON", value_parser = word::<Reason>)]
    pub(super) reason: Option<Reason>,
    /// Only this item; may be repeated.
    #[arg(long, value_name = "ID")]
    pub(super) item: Vec<ItemId>,
}

#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct Consent {
    /// Show what would be done, and do nothing.
    #[arg(long, conflicts_with = "yes")]
    pub(super) dry_run: bool,
    /// Do not ask for confirmation.
    #[arg(long, short)]
    pub(super) yes: bool,
    /// Start over instead of continuing an interrupted run.
    #[arg(long)]
    pub(super) restart: bool,
}

/// A word of a record, as it stands there.
fn word<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

impl PieceArgs {
    /// Whether it says how something ended.
    pub(super) const fn has_end(&self) -> bool {
        self.class.is_some() || self.reason.is_some()
    }

    pub(super) fn filter(&self) -> Filter {
        let items: BTreeSet<ItemId> = self.item.iter().cloned().collect();
        Filter { source: self.source.clone(), batch: self.batch.clone(), class: self.class, reason: self.reason, items }
    }
}

/// A name that is the same for the same arguments.
pub(super) fn name(arguments: &impl std::fmt::Debug) -> String {
    hex::encode(&Sha1::digest(format!("{arguments:?}"))[..6])
}

/// Asks for confirmation on a terminal, and fails without one. `false` if it was interrupted.
pub(super) async fn confirm(stop: &CancellationToken) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(Ended::usage("nothing was done: cannot ask for confirmation without a terminal; add --yes").into());
    }
    note("Continue? [y/N]");
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).map(|_| line)
    });
    let answer = tokio::select! {
        answer = answer => answer??,
        () = stop.cancelled() => return Ok(false),
    };
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(true),
        _ => Err(Ended::failed("nothing was done").into()),
    }
}

/// Whether something is told before it is done, or after.
#[derive(Clone, Copy, Debug)]
pub(super) enum Told {
    Before,
    After,
}

impl Told {
    /// What goes with so many: `1 was sent`, `2 would be sent`.
    pub(super) const fn verb(self, number: u64) -> &'static str {
        match self {
            Self::Before => "would be",
            Self::After => agree(number, "was", "were"),
        }
    }
}

/// How many were meant, how many of these are in the tables, and how many are inserted.
pub(super) fn in_tables(noun: &str, [meant, there, inserted]: [u64; 3], into: &Into, told: Told) -> String {
    let (are, verb) = (agree(there, "is", "are"), told.verb(inserted));
    let (meant, there, inserted) = (counted(meant, noun), grouped(there), grouped(inserted));
    format!("Of {meant}, {there} {are} already in {into}; {inserted} {verb} inserted")
}

/// How far it is, how fast, and how long it still takes.
pub(super) struct Bar {
    progress: Progress,
    rate: Rate,
    total: u64,
}

impl Bar {
    pub(super) fn new(total: u64) -> Self {
        Self { progress: Progress::new(), rate: Rate::default(), total }
    }

    #[allow(clippy::cast_precision_loss, reason = "a share for people")]
    pub(super) fn show(&mut self, read: u64, what: u64) {
        let rate = self.rate.add(Instant::now(), read);
        let share = read as f64 / self.total.max(1) as f64;
        let left = Rate::words(rate, Some(self.total.saturating_sub(read)));
        self.progress.show(Some(share), || format!("{} read{left}; {} to write", grouped(read), grouped(what)));
    }

    pub(super) fn clear(&self) {
        self.progress.clear();
    }
}

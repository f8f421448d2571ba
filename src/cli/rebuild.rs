//! `weir replay --from-table`: rebuilds rows from their stored JSON.

use std::collections::HashMap;

use anyhow::Context;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    elsewhere::expect_table,
    exit::{Ended, Exit},
    piece::{Bar, Consent, EMPTY_PIECE, PieceArgs, Told, confirm, in_tables, name},
    terminal::{say, spoken},
};
use crate::{
    config::Config,
    kafka::log_names::Names,
    message::envelope::Kind,
    replay::{
        into::Into,
        rebuild::Rebuild,
        tables::{Tally, Target},
        when::{WhenError, time},
    },
    runtime::clock::Clock,
    store::{
        Store,
        present::Place,
        stored::{Reach, Wanted},
    },
};

const TABLE: &str = "observations";

pub(super) async fn run(
    table: &str,
    into: &Into,
    piece: &PieceArgs,
    consent: Consent,
    config: &Config,
    stop: &CancellationToken,
) -> anyhow::Result<Exit> {
    if table != TABLE {
        return Err(Ended::usage(format!("only {TABLE} holds the vendors' JSON: --from-table {TABLE}")).into());
    }
    let into = &into.clone().of(Kind::Result, &config.clickhouse.database).map_err(Ended::usage)?;
    let Into::Elsewhere { database, table } = into else {
        return Err(Ended::usage(
            "the table holds these rows already: name another one, --into DATABASE or DATABASE.TABLE",
        )
        .into());
    };
    let table = table.as_deref().unwrap_or(TABLE);
    let wanted = wanted(piece)?;
    let from = Store::connect(&config.clickhouse)?;
    let mut elsewhere = config.clickhouse.clone();
    elsewhere.database.clone_from(database);
    let store = Store::connect(&elsewhere)?;
    let place = Place { table: table.to_owned() };
    expect_table(&store, database, table, Kind::Result).await?;
    let mut vendors = HashMap::new();
    for source in &config.sources {
        let vendor = source.vendor().with_context(|| format!("source {}", source.common.name))?;
        vendors.insert(source.common.name.clone(), vendor);
    }
    let reach = from.reach(&wanted).await?;
    let target = Target { store, place, names: Names::default() };
    let mut rebuild = Rebuild { from: &from, wanted: &wanted, target, vendors: &vendors, run: None };
    if !consent.yes {
        let Some(counted) = pass(&rebuild, &reach, stop).await? else { return Ok(Exit::Interrupted) };
        say(&words(&counted, into, Told::Before))?;
        if consent.dry_run || counted.inserted == 0 {
            return Ok(Exit::Done);
        }
        if !confirm(stop).await? {
            return Ok(Exit::Interrupted);
        }
    }
    rebuild.run = Some(name(&(piece, into)));
    let since = Instant::now();
    let Some(sum) = pass(&rebuild, &reach, stop).await? else {
        say("Interrupted. Run the same command again to insert the rest")?;
        return Ok(Exit::Interrupted);
    };
    say(&format!("{}, in {}", words(&sum, into, Told::After), spoken(since.elapsed())))?;
    Ok(Exit::Done)
}

async fn pass(rebuild: &Rebuild<'_>, reach: &[Reach], stop: &CancellationToken) -> anyhow::Result<Option<Tally>> {
    let mut bar = Bar::new(reach.iter().map(|reach| reach.rows).sum());
    let done = tokio::select! {
        done = rebuild.run(reach, |tally| bar.show(tally.meant, tally.inserted)) => Some(done),
        () = stop.cancelled() => None,
    };
    bar.clear();
    Ok(done.transpose()?)
}

fn wanted(piece: &PieceArgs) -> anyhow::Result<Wanted> {
    if piece.has_end() {
        return Err(Ended::usage("rows of observations have neither --class nor --reason").into());
    }
    let now = Clock::System.now();
    let at = |text: &Option<String>| text.as_deref().map(|text| time(text, now)).transpose();
    let usage = |error: WhenError| Ended::usage(error.to_string());
    let (from, to) = (at(&piece.from).map_err(usage)?, at(&piece.to).map_err(usage)?);
    if from.zip(to).is_some_and(|(from, to)| from >= to) {
        return Err(Ended::usage(EMPTY_PIECE).into());
    }
    let (source, batch, items) = (piece.source.clone(), piece.batch.clone(), piece.item.clone());
    Ok(Wanted { source, batch, items, from, to })
}

fn words(tally: &Tally, into: &Into, told: Told) -> String {
    let Tally { meant, there, inserted, .. } = tally;
    in_tables("row", [*meant, *there, *inserted], into, told)
}

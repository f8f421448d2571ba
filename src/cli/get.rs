//! `weir get`: one item now.

use std::time::Duration;

use serde::Serialize;

use super::{
    arguments::{age, duration, known_source, parameter},
    exit::{Ended, Exit},
    terminal::{note, say, spoken},
};
use crate::{
    config::Config,
    message::{ItemId, SourceName, Status, Via, price},
    run,
    runtime::duration_text::duration_text,
    serve::{Answered, Desk, Given, Question, reply::Body},
};

pub(super) const LONG_ABOUT: &str = "\
Get one item now: from the cache, else by a request that this command waits for.

The cache is used as for every request: [source.cache] limits the age of an answer, --max-age overrides it, 0 always \
calls. The request waits for a slot of the quota like all others, so a fetch role must be running; its outcome becomes \
a row as well. While the vendor has an outage an older answer is printed, if one is within its limits, with a note.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir get ali1688 584051070147                   # as fresh as [source.cache] says
  weir get ali1688 584051070147 --max-age 5m      # at most five minutes old
  weir get ali1688 584051070147 --max-age 0 --json | jq .columns.price

Exit codes:
  0 the item was found, also if the answer is old
  1 the vendor has no such item, or the request was given up
  64 no such source
  69 no answer within --wait; the request stays queued";

/// How long the end of a command waits for the request that is to renew what it has given.
const FINISH: Duration = Duration::from_secs(2);

/// `weir get`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The source.
    source: SourceName,
    /// The item.
    #[arg(value_parser = |text: &str| ItemId::new(text))]
    id: ItemId,
    /// The most that a cached answer may be old; 0: always call. By default [source.cache] decides.
    #[arg(long, value_name = "DURATION", value_parser = age)]
    max_age: Option<Duration>,
    /// A parameter of the vendor's API.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parameter)]
    param: Vec<(String, String)>,
    /// How long to wait for the answer.
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "30s")]
    wait: Duration,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: Args, config: &Config) -> anyhow::Result<Exit> {
    known_source(config, &args.source)?;
    let desk = run::desk(config, &config.open_cache()?, 1)?;
    let question = Question {
        source: args.source,
        item: args.id,
        params: args.param.into_iter().collect(),
        max_age: args.max_age,
        wait: args.wait,
    };
    // What is in the cache needs no Kafka.
    let answered = if let Some(given) = desk.look(&question).await? {
        Answered::Item(given)
    } else {
        let tail = desk.open().await?;
        tokio::select! {
            answered = desk.ask(&question) => answered?,
            lost = desk.listen(tail) => match lost? {},
        }
    };
    let exit = show(&question, answered, &desk, args.json);
    desk.finish(FINISH).await;
    exit
}

fn show(question: &Question, answered: Answered, desk: &Desk, json: bool) -> anyhow::Result<Exit> {
    match answered {
        Answered::Item(given) => {
            if given.source != question.source {
                note(&format!("{} does not answer: this is the answer of {}", question.source, given.source));
            }
            if given.via == Via::Stale {
                let age = spoken(desk.now().since(given.fetched_at));
                note(&format!("the vendor did not answer: this is its answer from {age} ago"));
            }
            say(&if json { line(&Body::of(question, &given))? } else { sheet(question, &given, desk) })?;
            Ok(if given.is_there() { Exit::Done } else { Exit::Failed })
        }
        Answered::GivenUp(dead) => {
            Err(Ended::failed(format!("the request for {} was given up: {}", question.item, dead.message)).into())
        }
        Answered::Late(failure) => {
            let why = failure.map_or_else(
                || "Is a fetch role running, and is an account available? See `weir status`".to_owned(),
                |failure| format!("the last call failed: {failure}"),
            );
            let wait = duration_text(question.wait);
            let message = format!("no answer within {wait}; the request stays queued. {why}");
            Err(Ended { exit: Exit::Unavailable, message }.into())
        }
    }
}

fn line(body: &impl Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string(body)?)
}

/// For people: what there is, line by line.
fn sheet(question: &Question, given: &Given, desk: &Desk) -> String {
    let columns = &given.answer.columns;
    let status = match given.answer.status {
        Status::Found => "found",
        Status::Absent => "the vendor has no such item",
        Status::OffShelf => "not for sale",
    };
    let price = price::shown(columns.price.as_deref(), columns.price_text.as_deref()).map(|price| {
        let currency = columns.currency.as_deref().unwrap_or_default();
        format!("{price} {currency}").trim().to_owned()
    });
    let via = match &given.via {
        Via::Call => "a call",
        Via::Cache => "the cache",
        Via::Stale => "the cache, since the call failed",
        Via::Other(word) => word,
    };
    let age = spoken(desk.now().since(given.fetched_at));
    let from = format!("{via}, {age} old ({})", given.fetched_at);
    let lines = [
        ("item", Some(format!("{} {}", given.source, question.item))),
        ("status", Some(status.to_owned())),
        ("title", columns.title.clone()),
        ("price", price),
        ("stock", columns.stock.clone()),
        ("rating", columns.rating.clone()),
        ("seller", columns.seller_nick.clone()),
        ("from", Some(from)),
    ];
    let lines = lines.into_iter().filter_map(|(name, value)| Some(format!("{name:<8}{}", value?)));
    lines.collect::<Vec<_>>().join("\n")
}

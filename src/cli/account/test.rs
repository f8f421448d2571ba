//! `weir account test`: one harmless call, and what its answer means.

use anyhow::Context;

use super::{Ended, Exit, Found, slot};
use crate::{
    cli::terminal::say,
    config::Config,
    message::{AccountAlias, ItemId, Request, Status},
    platform::{Common, Denial, Refusal, RefusalKind},
    runtime::clock::Clock,
};

pub(super) const EXAMPLES: &str = "\
Examples:
  weir account test ali1688 shop-1                        # request an item that does not exist
  weir account test ali1688 shop-1 --item 584051070147    # request one of yours

The call counts against the quota: with quota.store = \"redis\" it waits for a slot of the shared quota. It does not renew an expired token.

Exit codes: 0 the vendor answered, 1 it refused the call, 64 there is no such account";

/// `weir account test`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The source.
    source: String,
    /// The account.
    alias: AccountAlias,
    /// The item to request.
    #[arg(long, value_name = "ID", default_value = "1")]
    item: String,
}

pub(super) async fn run(args: &Args, config: &Config) -> anyhow::Result<Exit> {
    let item = ItemId::new(args.item.as_str()).map_err(|error| Ended::usage(format!("--item: {error}")))?;
    let found = Found::find(config, &args.source, &args.alias).await?;
    let (account, request) = (found.effective(), Request::new(item));
    slot::wait(config, &found.source, found.index).await?;
    let source = &found.source;
    let exchange = source.vendor.prepare(&account, &[&request], Clock::System.now());
    let answer = match source.client.exchange(&exchange).await {
        Ok(reply) => {
            let each = source.vendor.interpret(&[&request], &reply).each(1);
            each.into_iter().next().context("the reply has no answer for the item")?
        }
        Err(refusal) => Err(refusal),
    };
    let (name, alias) = (&source.name, &args.alias);
    match answer.map_err(|refusal| refusal.redacted(&account)) {
        Ok(answer) => {
            let about = match answer.status {
                Status::Found => "is there",
                Status::Absent => "does not exist for this account",
                Status::OffShelf => "is no longer sold",
            };
            say(&format!("ok: {name} accepts key, signature and token of {alias}. Item {} {about}", request.item))?;
            Ok(Exit::Done)
        }
        Err(refusal) => {
            say(&format!("refused: {} {}", refusal.code, refusal.message))?;
            Err(Ended::failed(advice(&refusal, name.as_str(), alias.as_str())).into())
        }
    }
}

/// Explains the refusal to the user.
fn advice(refusal: &Refusal, source: &str, alias: &str) -> String {
    match &refusal.kind {
        RefusalKind::Denied(Denial::Token) => format!(
            "the vendor rejects the token of {alias}: it is missing, expired or revoked. weir renews it if it has a \
             refresh token; otherwise: weir account authorise {source} {alias}"
        ),
        RefusalKind::Denied(Denial::Account) => {
            format!("the vendor rejects {alias}: is app_secret right, does the app exist, may it use this API?")
        }
        RefusalKind::Throttled { .. } => {
            format!("{alias} is over its quota at the moment: the vendor knows key and secret")
        }
        RefusalKind::Outage | RefusalKind::Unclear => {
            format!("the vendor cannot be reached or has an outage: this says nothing about {alias}")
        }
        RefusalKind::Misconfigured(Common::Clock) => {
            "the vendor rejects this machine's time: set its clock; this says nothing about the account".to_owned()
        }
        RefusalKind::Misconfigured(Common::Later) => {
            "the vendor answers later, which this source is not set up for; nothing is said about the account"
                .to_owned()
        }
        RefusalKind::Misconfigured(Common::Form | Common::Params) | RefusalKind::Malformed | RefusalKind::Bug => {
            "the vendor rejected the form of the call, or its reply cannot be read: see api, params and columns of the \
             source"
                .to_owned()
        }
    }
}

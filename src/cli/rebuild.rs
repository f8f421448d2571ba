//! `weir replay --from-table`: rows once more from their stored JSON.

use tokio_util::sync::CancellationToken;

use super::{
    exit::{Ended, Exit},
    replay::{Consent, PieceArgs},
};
use crate::{config::Config, replay::into::Into};

pub(super) async fn run(
    _table: &str,
    _into: &Into,
    _piece: &PieceArgs,
    _consent: Consent,
    _config: &Config,
    _stop: &CancellationToken,
) -> anyhow::Result<Exit> {
    Err(Ended::usage("not yet").into())
}

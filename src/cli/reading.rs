//! Reads records of topics with a progress bar.

use super::terminal::{Progress, grouped};
use crate::kafka::{
    Partition, Record, client,
    scan::{Piece, Scan, Span},
};

/// Hands each record of these spans to `take`; `what` names them beside the bar.
///
/// # Errors
/// Kafka's.
pub(super) async fn read_each(
    kafka: &client::Config,
    spans: Vec<Span>,
    what: &str,
    mut take: impl FnMut(&Partition, &Record),
) -> anyhow::Result<()> {
    let (total, mut done) = (spans.iter().map(Span::length).sum::<u64>(), 0);
    let mut progress = Progress::new();
    let mut scan = Scan::open(kafka, spans)?;
    while let Some(piece) = scan.next().await? {
        let Piece::Records { partition, records } = piece else { continue };
        done += records.len() as u64;
        for record in &records {
            take(&partition, record);
        }
        #[allow(clippy::cast_precision_loss, reason = "a share")]
        progress.show(Some(done as f64 / total.max(1) as f64), || format!("{} {what}", grouped(done)));
    }
    progress.clear();
    Ok(())
}

//! `weir export`: the result of a query as a CSV or Parquet file.

use std::path::{Path, PathBuf};

use anyhow::Context;
use bytesize::ByteSize;
use tokio::{
    fs::{self, File},
    io::AsyncWrite,
};

use super::{
    exit::{Ended, Exit},
    query::expect_format,
    terminal::say,
};
use crate::{
    config::Config,
    store::query::{Format, QueryError, read, samples},
};

pub(super) const LONG_ABOUT: &str = "\
Write the result of a query to a file.

The query is SQL, the name of a table or view (items, changes, observations, daily(time_zone = 'Asia/Shanghai'), …), \
or \
the number of a sample query (`weir export --list`). It is read-only. The file appears when it is complete: a failed \
export leaves no file, and does not touch an existing one.";

pub(super) const EXAMPLES: &str = "\
Examples:
  weir export items --csv items.csv
  weir export \"SELECT item, price FROM items WHERE source = 'ali1688'\" --parquet prices.parquet
  weir export 8 --csv drops.csv                         # the biggest drops of the week
  weir export changes --csv - | head                    # to standard output";

/// `weir export`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// SQL, the name of a table or view, or the number of a sample query.
    #[arg(required_unless_present = "list")]
    what: Option<String>,
    /// Write CSV with a header; `-` is standard output.
    #[arg(long, value_name = "FILE", conflicts_with = "parquet", required_unless_present_any = ["parquet", "list"])]
    csv: Option<PathBuf>,
    /// Write Parquet; `-` is standard output.
    #[arg(long, value_name = "FILE")]
    parquet: Option<PathBuf>,
    /// List the sample queries.
    #[arg(long)]
    list: bool,
}

pub(super) async fn run(args: Args, config: &Config) -> anyhow::Result<Exit> {
    if args.list {
        for (number, sample) in (1..).zip(samples()) {
            say(&format!("{number:>3}  {}", sample.title))?;
        }
        return Ok(Exit::Done);
    }
    let sql = sql(args.what.as_deref().unwrap_or_default())?;
    let (path, format, option) = match (args.csv, args.parquet) {
        (Some(path), _) => (path, "CSVWithNames", "--csv"),
        (None, path) => (path.unwrap_or_else(|| "-".into()), "Parquet", "--parquet"),
    };
    expect_format(config, &sql, format, option).await?;
    let format = Format::Named(format.to_owned());
    if path == Path::new("-") {
        answer(config, &sql, &format, &mut tokio::io::stdout()).await?;
        return Ok(Exit::Done);
    }
    let size = write(config, &sql, &format, &path).await?;
    say(&format!("wrote {} ({})", path.display(), ByteSize::b(size)))?;
    Ok(Exit::Done)
}

/// The SQL that a word stands for.
fn sql(what: &str) -> Result<String, Ended> {
    let what = what.trim();
    if let Ok(number) = what.parse::<usize>() {
        let sample = number.checked_sub(1).and_then(|index| samples().nth(index));
        let unknown = || Ended::usage(format!("there is no sample query {number}: `weir export --list` shows them"));
        return sample.map(|sample| sample.sql.to_owned()).ok_or_else(unknown);
    }
    let name = what.split_once('(').filter(|_| what.ends_with(')')).map_or(what, |(name, _)| name);
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.".contains(&byte));
    match (is_name, what.is_empty()) {
        (true, _) => Ok(format!("SELECT * FROM {what}")),
        (false, true) => Err(Ended::usage("nothing to export: give SQL, or the name of a table or view")),
        (false, false) => Ok(what.to_owned()),
    }
}

async fn answer(
    config: &Config,
    sql: &str,
    format: &Format,
    out: &mut (impl AsyncWrite + Unpin),
) -> Result<(), QueryError> {
    let answered = read(&config.clickhouse, sql, format, out).await;
    answered.map_err(|error| error.in_sql_by_hand(&config.clickhouse.database))
}

/// Writes beside the file and puts it in its place at the end; its size in bytes.
async fn write(config: &Config, sql: &str, format: &Format, path: &Path) -> anyhow::Result<u64> {
    let name = path.file_name().ok_or_else(|| Ended::usage(format!("{} is not a file name", path.display())))?;
    let beside = path.with_file_name(format!(".{}.part", name.to_string_lossy()));
    let mut file = File::create(&beside).await.with_context(|| format!("cannot write {}", path.display()))?;
    let written = async {
        answer(config, sql, format, &mut file).await?;
        file.sync_all().await.with_context(|| format!("cannot write {}", beside.display()))?;
        let size = file.metadata().await?.len();
        fs::rename(&beside, path).await.with_context(|| format!("cannot write {}", path.display()))?;
        anyhow::Ok(size)
    };
    let written = written.await;
    if written.is_err() {
        // What is half there is of no use to anybody.
        let _ = fs::remove_file(&beside).await;
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_a_table_a_number_a_sample_and_all_else_sql() {
        assert_eq!(sql("items").unwrap(), "SELECT * FROM items");
        for name in ["weir.items", "daily(time_zone = 'Asia/Shanghai')"] {
            assert_eq!(sql(name).unwrap(), format!("SELECT * FROM {name}"));
        }
        assert_eq!(sql(" SELECT 1 ").unwrap(), "SELECT 1");
        assert_eq!(sql("SELECT max(1)").unwrap(), "SELECT max(1)");
        assert_eq!(sql("8").unwrap(), samples().nth(7).unwrap().sql);
        for nothing in ["", "  ", "0", "99"] {
            assert!(sql(nothing).is_err(), "{nothing:?}");
        }
    }
}

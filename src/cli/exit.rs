//! Exit codes of commands, and errors as one readable message.

use std::process::ExitCode;

use super::terminal;
use crate::{
    cache::InvalidUrl,
    config::ConfigError,
    fetch::FetchError,
    kafka::{ReadError, TransactError, WriteError, admin::AdminError, intake::IntakeError},
    platform::OpenError,
    replay::when::WhenError,
    run::RunError,
    runtime::shutdown::INTERRUPTED,
    sink::SinkError,
    store::{ConnectionError, Trouble, TroubleKind, query::QueryError, schema::SchemaError},
};

/// The exit codes, as in sysexits.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Not done, or not all of it.
    Failed = 1,
    /// The configuration or the command line is not valid.
    Usage = 64,
    /// A server cannot be reached.
    Unavailable = 69,
    /// Another process has this instance's name.
    Taken = 75,
    /// Stopped by a signal before the end.
    Interrupted = INTERRUPTED as isize,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error with the code that it ends the process with, where its type does not say it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Ended {
    /// The code.
    pub exit: Exit,
    /// What to tell the user.
    pub message: String,
}

impl Ended {
    /// A command line that cannot be meant.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, message: message.into() }
    }

    /// Something is missing, but could be there.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { exit: Exit::Failed, message: message.into() }
    }
}

/// Prints clap's own message: help to standard output with code 0, a usage error with 64.
#[must_use]
pub fn usage(error: &clap::Error) -> ExitCode {
    let exit = if error.use_stderr() { Exit::Usage } else { Exit::Done };
    // Nobody is left to tell if even this cannot be printed.
    let _ = error.print();
    exit.into()
}

/// Prints an error cause after cause, and finds its exit code.
#[must_use]
pub fn report(error: &anyhow::Error) -> ExitCode {
    if is_closed_pipe(error) {
        return Exit::Done.into();
    }
    terminal::note(&format!("error: {}", message(error)));
    exit_of(error).into()
}

/// Cause after cause; what repeats the cause before it is left out.
fn message(error: &anyhow::Error) -> String {
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        if causes.last().is_none_or(|before| !before.contains(&cause)) {
            causes.push(cause);
        }
    }
    causes.join("\n  because: ")
}

/// `weir query … | head` has seen enough: that is no failure.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let is_closed = |io: &std::io::Error| io.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(is_closed)
            || matches!(cause.downcast_ref::<QueryError>(), Some(QueryError::Output(io)) if is_closed(io))
    })
}

/// The exit code that fits the error.
#[must_use]
pub fn exit_of(error: &anyhow::Error) -> Exit {
    error.chain().find_map(exit_of_cause).unwrap_or(Exit::Failed)
}

type Cause<'a> = &'a (dyn std::error::Error + 'static);

fn exit_of_cause(cause: Cause<'_>) -> Option<Exit> {
    let usage = cause.is::<ConfigError>()
        || cause.is::<OpenError>()
        || cause.is::<ConnectionError>()
        || cause.is::<WhenError>()
        || cause.is::<InvalidUrl>()
        || cause.is::<RunError>();
    cause
        .downcast_ref::<Ended>()
        .map(|ended| ended.exit)
        .or(usage.then_some(Exit::Usage))
        .or_else(|| kafka(cause))
        .or_else(|| clickhouse(cause))
}

fn kafka(cause: Cause<'_>) -> Option<Exit> {
    let read = |error: &ReadError| matches!(error, ReadError::Fenced { .. }).then_some(Exit::Taken);
    let transact = |error: &TransactError| matches!(error, TransactError::Fenced { .. }).then_some(Exit::Taken);
    let intake = |error: &IntakeError| error.is_fenced().then_some(Exit::Taken);
    // A transparent error hides the one inside from the chain: each is looked for by its own type.
    if let Some(error) = cause.downcast_ref::<ReadError>() {
        read(error)
    } else if let Some(error) = cause.downcast_ref::<TransactError>() {
        transact(error)
    } else if let Some(error) = cause.downcast_ref::<IntakeError>() {
        intake(error)
    } else if let Some(FetchError::Intake(error)) = cause.downcast_ref::<FetchError>() {
        intake(error)
    } else if let Some(SinkError::Read(error)) = cause.downcast_ref::<SinkError>() {
        read(error)
    } else if let Some(AdminError::Unreachable { .. }) = cause.downcast_ref::<AdminError>() {
        Some(Exit::Unavailable)
    } else {
        // A write is given up after a minute without an answer.
        matches!(cause.downcast_ref::<WriteError>(), Some(WriteError::Refused { .. })).then_some(Exit::Unavailable)
    }
}

fn clickhouse(cause: Cause<'_>) -> Option<Exit> {
    let trouble = |trouble: &Trouble| (trouble.kind == TroubleKind::Away).then_some(Exit::Unavailable);
    if let Some(error) = cause.downcast_ref::<Trouble>() {
        return trouble(error);
    }
    match (cause.downcast_ref::<QueryError>(), cause.downcast_ref::<SchemaError>()) {
        (Some(QueryError::Connection(_)), _) | (_, Some(SchemaError::Connection(_))) => Some(Exit::Usage),
        (Some(QueryError::Trouble(inner)), _) | (_, Some(SchemaError::Refused { trouble: inner, .. })) => {
            trouble(inner)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    fn away() -> Trouble {
        Trouble { kind: TroubleKind::Away, code: None, message: "refused".to_owned(), view: None }
    }

    #[test]
    fn every_kind_of_failure_has_its_code_however_deep_it_lies() {
        let fenced = || ReadError::Fenced { name: "a".to_owned(), reason: "b".to_owned() };
        let unreachable = AdminError::Unreachable { brokers: "b".to_owned(), reason: "r".to_owned() };
        let table: Vec<(anyhow::Error, Exit)> = vec![
            (anyhow::anyhow!("anything"), Exit::Failed),
            (ConfigError::Invalid(Vec::new()).into(), Exit::Usage),
            (Ended::usage("no such source").into(), Exit::Usage),
            (RunError::NothingToFetch.into(), Exit::Usage),
            (unreachable.into(), Exit::Unavailable),
            (away().into(), Exit::Unavailable),
            (QueryError::Trouble(away()).into(), Exit::Unavailable),
            (fenced().into(), Exit::Taken),
            (FetchError::Intake(IntakeError::Read(fenced())).into(), Exit::Taken),
            (SinkError::Read(fenced()).into(), Exit::Taken),
        ];
        for (error, expected) in table {
            let text = format!("{error:?}");
            assert_eq!(exit_of(&Err::<(), _>(error).context("outer").unwrap_err()), expected, "{text}");
        }
    }

    #[test]
    fn causes_are_joined_and_not_repeated() {
        let io = std::io::Error::other("no such file");
        let error = anyhow::Error::new(io).context("reading ids.txt: no such file").context("enqueue");
        assert_eq!(message(&error), "enqueue\n  because: reading ids.txt: no such file");
    }
}

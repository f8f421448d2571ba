//! What is said to the ledger of batches' budgets in Redis: its script, its replies and its news.

use ::redis::{
    ErrorKind, ParsingError, RedisError, RedisResult, Script, Value, aio::MultiplexedConnection, from_redis_value,
};
use serde::Deserialize;
use tracing::warn;

use crate::{
    message::BatchId,
    quota::purse::{
        ledger::{Part, Word},
        register::{Answer, Input, News, Output},
    },
};

/// The ledger, as Redis keeps it.
const SCRIPT: &str = include_str!("../purse.lua");

/// One connection's way to the ledger.
#[derive(Clone)]
pub struct Books {
    script: Script,
    key: String,
    run_id: String,
}

impl Books {
    pub fn new(key: String, run_id: String) -> Self {
        Self { script: Script::new(SCRIPT), key, run_id }
    }

    /// Says something.
    pub async fn say(&self, connection: &mut MultiplexedConnection, input: &Input) -> RedisResult<Output> {
        let input = serde_json::to_string(input).unwrap_or_default();
        let mut invocation = self.script.prepare_invoke();
        invocation.key(&self.key).arg(&self.run_id).arg(input);
        let reply: Vec<Value> = invocation.invoke_async(connection).await?;
        parse(reply).map_err(|_| {
            RedisError::from((ErrorKind::UnexpectedReturnType, "the ledger's script gave an unknown reply"))
        })
    }
}

type WordOnWire = (String, String, u64, u64, u64);

fn parse(reply: Vec<Value>) -> Result<Output, ParsingError> {
    let mut parts = reply.into_iter();
    let mut part = || parts.next().unwrap_or(Value::Nil);
    let birth = from_redis_value(part())?;
    let answers = from_redis_value::<Vec<(String, u64, u64, u64, u64)>>(part())?;
    let all = from_redis_value::<Vec<WordOnWire>>(part())?;
    let answer = |(batch, seq, granted, is_spent, calls)| {
        Some(Answer { batch: known(batch)?, seq, granted, is_spent: is_spent > 0, calls })
    };
    Ok(Output {
        birth,
        answers: answers.into_iter().filter_map(answer).collect(),
        all: all.into_iter().filter_map(word).collect(),
    })
}

fn known(batch: String) -> Option<BatchId> {
    BatchId::new(batch).inspect_err(|error| warn!(%error, "skipped an invalid batch name in Redis")).ok()
}

fn word((batch, holder, granted, calls, seq): WordOnWire) -> Option<Word> {
    Some((known(batch)?, holder, Part { granted, calls, seq }))
}

/// An announcement of the ledger's.
#[derive(Deserialize)]
enum Heard {
    #[serde(rename = "ledger")]
    Born(String),
    #[serde(rename = "part")]
    Word(WordOnWire),
}

/// The ledger's news, if that is what is announced.
pub fn heard(payload: &[u8]) -> Option<News> {
    match serde_json::from_slice(payload).ok()? {
        Heard::Born(birth) => Some(News::Born(birth)),
        Heard::Word(wire) => word(wire).map(News::Word),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_of_the_ledger_are_told_from_those_of_holds() {
        let batch = BatchId::new("b").unwrap();
        let part = Part { granted: 8, calls: 3, seq: 2 };
        assert_eq!(heard(br#"{"ledger":"17"}"#), Some(News::Born("17".to_owned())));
        assert_eq!(heard(br#"{"part":["b","h",8,3,2]}"#), Some(News::Word((batch, "h".to_owned(), part))));
        for other in [&br#"{"birth":"17"}"#[..], br#"["a","+inf","ban","1"]"#, b"rubbish"] {
            assert_eq!(heard(other), None);
        }
        for ours in [&br#"{"ledger":"17"}"#[..], br#"{"part":["b","h",8,3,2]}"#] {
            use super::super::wire;
            assert!(wire::announced(ours).is_none() && wire::paced(ours).is_none() && wire::born(ours).is_none());
        }
    }
}

//! `GET /items/{source}/{id}`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode, header::IF_NONE_MATCH},
    response::{IntoResponse, Response},
    routing::get,
};

use super::{
    Config,
    desk::{Desk, Question},
    reply::{Reply, problem, reply},
};
use crate::message::{ItemId, SourceName};

/// The path, at this desk. Read only: nothing is changed by it but the cache.
pub fn router(desk: Arc<Desk>, config: &Config) -> Router {
    Router::new().route("/items/{source}/{id}", get(item)).with_state((desk, config.wait))
}

impl IntoResponse for Reply {
    fn into_response(self) -> Response {
        (self.status, self.headers, self.body).into_response()
    }
}

async fn item(
    State((desk, wait)): State<(Arc<Desk>, Duration)>,
    Path((source, id)): Path<(String, String)>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
) -> Reply {
    let question = match question(&source, &id, query, wait) {
        Ok(question) => question,
        Err(message) => return problem(StatusCode::BAD_REQUEST, &message, None),
    };
    let answered = desk.ask(&question).await;
    if let Err(error) = &answered {
        tracing::warn!(source, item = id, %error, "cannot serve an item");
    }
    let known = headers.get(IF_NONE_MATCH).and_then(|known| known.to_str().ok());
    reply(&question, &answered, known, desk.now())
}

/// `max_age` is ours; everything else is a parameter of the vendor's API.
fn question(source: &str, id: &str, mut query: BTreeMap<String, String>, wait: Duration) -> Result<Question, String> {
    let max_age = query.remove("max_age").map(|text| {
        let seconds = text.parse().ok().map(Duration::from_secs);
        let age = seconds.or_else(|| humantime::parse_duration(&text).ok());
        age.ok_or_else(|| format!("max_age is {text:?}; it must be a duration such as 5m, or a number of seconds"))
    });
    let max_age = max_age.transpose()?;
    let source = SourceName::new(source).map_err(|error| error.to_string())?;
    let item = ItemId::new(id).map_err(|error| error.to_string())?;
    Ok(Question { source, item, params: query, max_age, wait })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(query: &[(&str, &str)]) -> Result<Question, String> {
        let query = query.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        question("ali1688", "7", query, Duration::ZERO)
    }

    #[test]
    fn the_query_holds_the_age_and_the_vendors_parameters() {
        let question = asked(&[("max_age", "5m"), ("zip", "10001")]).unwrap();
        assert_eq!(question.max_age, Some(Duration::from_secs(300)));
        assert_eq!(question.params.into_iter().collect::<Vec<_>>(), [("zip".to_owned(), "10001".to_owned())]);
        assert_eq!(asked(&[("max_age", "0")]).unwrap().max_age, Some(Duration::ZERO));
        assert!(asked(&[("max_age", "soon")]).unwrap_err().contains("\"soon\""));
    }
}

//! One HTTP exchange: what is sent to a vendor, and what comes back. Data alone: [`super::http`] makes the call.

use std::time::Duration;

use bytes::Bytes;

use super::{
    headers::Headers,
    hints::{self, Hint},
};
use crate::runtime::clock::Timestamp;

/// One HTTP exchange to be made.
///
/// Secrets and signatures travel in the query, the headers and the body, which nobody prints: there is no `Debug`, and
/// errors show the URL up to its query.
#[derive(Clone)]
pub struct Exchange {
    /// How it is asked for.
    pub method: Method,
    /// Scheme, host and path, without anything secret.
    pub url: String,
    /// What is added to the URL's query, UTF-8, percent-encoded when it is sent. Servers on the way may write it down.
    pub query: Vec<(String, String)>,
    /// Headers besides those that the client sets; a header of the same name here replaces the client's.
    pub headers: Vec<(String, String)>,
    /// What is sent.
    pub body: Body,
}

/// An HTTP method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Asks.
    Get,
    /// Asks with a body, or orders.
    Post,
    /// Replaces.
    Put,
}

impl Method {
    /// Its name in HTTP.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
        }
    }
}

/// What is sent with an exchange. Each form but none has its `Content-Type`, unless a header says otherwise.
#[derive(Clone, PartialEq, Eq)]
pub enum Body {
    /// Nothing.
    None,
    /// `application/x-www-form-urlencoded`: names and values in UTF-8, in this order.
    Form(Vec<(String, String)>),
    /// `application/json`: a text that is JSON.
    Json(String),
    /// Anything else.
    Bytes {
        /// Its `Content-Type`.
        content_type: String,
        /// As it is sent.
        bytes: Bytes,
    },
}

impl Exchange {
    /// An exchange without query, headers and body.
    #[must_use]
    pub const fn new(method: Method, url: String) -> Self {
        Self { method, url, query: Vec::new(), headers: Vec::new(), body: Body::None }
    }

    /// A form as a body.
    #[must_use]
    pub const fn post(url: String, form: Vec<(String, String)>) -> Self {
        Self { method: Method::Post, url, query: Vec::new(), headers: Vec::new(), body: Body::Form(form) }
    }

    /// A form as a query, for vendors that take nothing else.
    #[must_use]
    pub const fn get(url: String, query: Vec<(String, String)>) -> Self {
        Self { method: Method::Get, url, query, headers: Vec::new(), body: Body::None }
    }

    /// The fields of a form that is the body; none if the body is no form.
    #[must_use]
    pub fn form(&self) -> &[(String, String)] {
        match &self.body {
            Body::Form(form) => form,
            Body::None | Body::Json(_) | Body::Bytes { .. } => &[],
        }
    }

    /// Every parameter by name: those of the query, then those of a form.
    pub fn params(&self) -> impl Iterator<Item = (&str, &str)> {
        self.query.iter().chain(self.form()).map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

/// An HTTP reply, body and all.
#[derive(Clone, Debug)]
pub struct HttpReply {
    /// The status.
    pub status: u16,
    /// Its headers.
    pub headers: Headers,
    /// When its headers came, by this machine's clock.
    pub received_at: Timestamp,
    /// The body, unpacked and in UTF-8 whatever it was sent as, at most [`super::http::BODY_LIMIT`] bytes; as it came if
    /// it is no text.
    pub body: Bytes,
}

impl HttpReply {
    /// A reply without headers.
    pub fn new(status: u16, body: impl Into<Bytes>, received_at: Timestamp) -> Self {
        Self { status, headers: Headers::default(), received_at, body: body.into() }
    }

    /// The same with these headers alone.
    #[must_use]
    pub fn with_headers<N: AsRef<str>, V: AsRef<[u8]>>(self, lines: impl IntoIterator<Item = (N, V)>) -> Self {
        Self { headers: Headers::new(lines), ..self }
    }

    /// What the sender's clock showed (`Date`), if it says so.
    #[must_use]
    pub fn date(&self) -> Option<Timestamp> {
        hints::date(&self.headers.get("date")?)
    }

    /// What the headers say of the vendor's limits.
    #[must_use]
    pub fn hint(&self) -> Hint {
        // Times are meant on the sender's clock, which it sends along.
        Hint::read(&self.headers, self.date().unwrap_or(self.received_at))
    }

    /// How long whoever is refused has to wait: `Retry-After` in either form, else until a quota that is used up comes
    /// back.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.hint().wait()
    }

    /// When there is more of a quota of which nothing is left, if the headers say so; on good replies too.
    #[must_use]
    pub fn used_up(&self) -> Option<Duration> {
        self.hint().used_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_in_headers_are_meant_on_the_senders_clock() {
        let (sent, until) = ("Tue, 14 Nov 2023 22:13:20 GMT", "Tue, 14 Nov 2023 22:14:20 GMT");
        // 20 s later here.
        let here = Timestamp::from_millis(1_700_000_020_000);
        let reply = HttpReply::new(503, "", here).with_headers([("retry-after", until)]);
        assert_eq!((reply.date(), reply.retry_after()), (None, Some(Duration::from_secs(40))));
        let reply = reply.with_headers([("Date", sent), ("Retry-After", until)]);
        assert_eq!(reply.retry_after(), Some(Duration::from_secs(60)));
        assert_eq!(reply.date(), Some(Timestamp::from_millis(1_700_000_000_000)));
    }

    #[test]
    fn parameters_are_those_of_the_query_and_of_a_form() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let both = Exchange { query: vec![pair("v", "2")], ..Exchange::post(String::new(), vec![pair("id", "1")]) };
        assert_eq!(both.params().collect::<Vec<_>>(), [("v", "2"), ("id", "1")]);
        let json = Exchange { body: Body::Json("{}".to_owned()), ..both };
        assert_eq!((json.params().count(), json.form().len()), (1, 0));
    }
}

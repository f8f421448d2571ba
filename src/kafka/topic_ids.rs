//! Topic ids, which the brokers assign when a topic is created.
//!
//! The only unsafe code of weir: rdkafka has no call for it, librdkafka has (`DescribeTopics`).

#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fmt,
    marker::PhantomData,
    ptr,
    str::FromStr,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use rdkafka::{
    ClientContext,
    bindings::{self as native, rd_kafka_admin_op_t, rd_kafka_resp_err_t},
    client::Client,
    error::KafkaError,
    types::RDKafkaErrorCode,
};

/// The id of a topic: another one means that the topic was deleted and re-created under its name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TopicId([u8; 16]);

impl TopicId {
    /// The length of its text.
    pub const LENGTH: usize = 22;

    /// The start of it, in hexadecimal digits: enough to tell the logs of one name apart.
    #[must_use]
    pub fn short(&self) -> String {
        hex::encode(&self.0[..4])
    }
}

/// As Kafka's own tools write it.
impl fmt::Display for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(self.0))
    }
}

impl fmt::Debug for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TopicId {
    type Err = base64::DecodeSliceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut id = [0; 16];
        let length = BASE64.decode_slice(text, &mut id)?;
        if length == id.len() { Ok(Self(id)) } else { Err(base64::DecodeSliceError::OutputSliceTooSmall) }
    }
}

/// The ids of topics by name. A topic that is not there has none; with brokers before 2.8 no topic has.
pub type TopicIds = HashMap<String, TopicId>;

/// A question for the ids of topics that is under way.
pub(super) struct Asking<'a> {
    queue: *mut native::rd_kafka_queue_t,
    /// The client has to outlive its queue.
    client: PhantomData<&'a ()>,
}

impl<'a> Asking<'a> {
    /// Asks for the ids of these topics; the answer comes within that time, if only as an error.
    ///
    /// # Errors
    /// [`KafkaError::AdminOp`] if the question cannot be put.
    pub fn begin<C: ClientContext>(
        client: &'a Client<C>,
        topics: impl IntoIterator<Item = impl Into<Vec<u8>>>,
        within: Duration,
    ) -> Result<Self, KafkaError> {
        let invalid = || KafkaError::AdminOp(RDKafkaErrorCode::InvalidArgument);
        let names: Vec<CString> =
            topics.into_iter().map(CString::new).collect::<Result<_, _>>().map_err(|_| invalid())?;
        let mut pointers: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
        let within = i32::try_from(within.as_millis()).unwrap_or(i32::MAX);
        let rk = client.native_ptr();
        // SAFETY: `rk` is a live client for as long as `client` is borrowed, and so for the whole block.
        // `pointers` holds as many C texts as it is long, and librdkafka copies them. Whatever is made here is either
        // destroyed here, or (the queue) owned by the value that is returned. DescribeTopics keeps neither the
        // collection nor the options, and holds the queue by a count of its own until it has answered.
        unsafe {
            let options = native::rd_kafka_AdminOptions_new(rk, rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS);
            if options.is_null() {
                return Err(invalid());
            }
            native::rd_kafka_AdminOptions_set_request_timeout(options, within, ptr::null_mut(), 0);
            let collection = native::rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len());
            let queue = native::rd_kafka_queue_new(rk);
            native::rd_kafka_DescribeTopics(rk, collection, options, queue);
            native::rd_kafka_TopicCollection_destroy(collection);
            native::rd_kafka_AdminOptions_destroy(options);
            Ok(Self { queue, client: PhantomData })
        }
    }

    /// The answer, if it comes within that time.
    pub fn poll(&self, wait: Duration) -> Option<Result<TopicIds, KafkaError>> {
        let wait = i32::try_from(wait.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: the queue lives until `self` is dropped.
        let event = unsafe { native::rd_kafka_queue_poll(self.queue, wait) };
        if event.is_null() {
            return None;
        }
        // SAFETY: the event is not null, ours alone, and destroyed once; `read` lets nothing of it escape.
        let answer = unsafe { read(event) };
        unsafe { native::rd_kafka_event_destroy(event) };
        Some(answer)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        // SAFETY: made in `begin`, destroyed only here; the client still lives, see the lifetime.
        unsafe { native::rd_kafka_queue_destroy(self.queue) };
    }
}

/// Copies the ids out of the event.
///
/// # Safety
/// `event` is a live event of the queue.
unsafe fn read(event: *mut native::rd_kafka_event_t) -> Result<TopicIds, KafkaError> {
    // SAFETY: all pointers come from librdkafka, which keeps what they point to until the event is destroyed: the list
    // has `count` descriptions, each with a name and an id; `error` is null or readable.
    unsafe {
        let error = native::rd_kafka_event_error(event);
        if error != rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Err(KafkaError::AdminOp(error.into()));
        }
        let result = native::rd_kafka_event_DescribeTopics_result(event);
        if result.is_null() {
            return Err(KafkaError::AdminOp(RDKafkaErrorCode::BadMessage));
        }
        let mut count = 0;
        let topics = native::rd_kafka_DescribeTopics_result_topics(result, &raw mut count);
        let mut ids = TopicIds::new();
        for index in 0..count {
            let topic = *topics.add(index);
            let error = native::rd_kafka_TopicDescription_error(topic);
            let id = native::rd_kafka_TopicDescription_topic_id(topic);
            let is_there = error.is_null()
                || native::rd_kafka_error_code(error) == rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR;
            if !is_there || id.is_null() {
                continue;
            }
            let halves =
                [native::rd_kafka_Uuid_most_significant_bits(id), native::rd_kafka_Uuid_least_significant_bits(id)];
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&halves[0].to_be_bytes());
            bytes[8..].copy_from_slice(&halves[1].to_be_bytes());
            if bytes != [0; 16] {
                let name = CStr::from_ptr(native::rd_kafka_TopicDescription_name(topic));
                ids.insert(name.to_string_lossy().into_owned(), TopicId(bytes));
            }
        }
        Ok(ids)
    }
}

/// The ids of these topics; blocks until the answer has come. Brokers that know nothing of it, or do not say, are
/// brokers without ids.
///
/// # Errors
/// [`KafkaError`]: no answer in time.
pub(super) fn ask<C: ClientContext>(
    client: &Client<C>,
    topics: impl IntoIterator<Item = impl Into<Vec<u8>>>,
    within: Duration,
) -> Result<TopicIds, KafkaError> {
    use RDKafkaErrorCode as Code;
    let answer = Asking::begin(client, topics, within)?.poll(within + Duration::from_secs(1));
    match answer.unwrap_or(Err(KafkaError::AdminOp(Code::OperationTimedOut))) {
        Err(KafkaError::AdminOp(
            Code::UnsupportedFeature
            | Code::UnsupportedVersion
            | Code::NotImplemented
            | Code::TopicAuthorizationFailed
            | Code::ClusterAuthorizationFailed,
        )) => Ok(TopicIds::new()),
        answer => answer,
    }
}

#[cfg(test)]
pub(crate) fn id(number: u8) -> TopicId {
    TopicId([number; 16])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_written_as_kafka_writes_it_and_read_back() {
        let id = TopicId(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
        assert_eq!(id.to_string(), "ABEiM0RVZneImaq7zN3u_w");
        assert_eq!((id.to_string().len(), id.short().as_str()), (TopicId::LENGTH, "00112233"));
        assert_eq!(id.to_string().parse::<TopicId>().unwrap(), id);
        for wrong in ["", "ABEiM0RVZneImaq7zN3u", "ABEiM0RVZneImaq7zN3u_wAA", "ABEiM0RVZneImaq7zN3u/w"] {
            assert!(wrong.parse::<TopicId>().is_err(), "{wrong}");
        }
    }
}

//! Conversions between rdkafka's types and weir's.

use bytes::{Bytes, BytesMut};
use rdkafka::{
    Message, Offset, TopicPartitionList,
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
};

use super::{Offsets, Outgoing, Partition, Record, TransactError, commit_mark, topic_ids::TopicId};
use crate::{
    message::envelope::{Headers, name},
    runtime::clock::Timestamp,
};

/// A message, copied out of librdkafka's memory, with all of its headers.
pub(super) fn record(message: &BorrowedMessage<'_>) -> Record {
    let headers = message.headers().map_or_else(Headers::new, |headers| {
        // One piece of memory for all values: copying records is mostly a matter of allocations.
        let length = headers.iter().filter_map(|header| header.value).map(<[u8]>::len).sum();
        let mut values = BytesMut::with_capacity(length);
        let own = |header: Header<'_, &[u8]>| {
            values.extend_from_slice(header.value.unwrap_or_default());
            (name(header.key), values.split().freeze())
        };
        headers.iter().map(own).collect()
    });
    with_headers(message, headers)
}

/// The same with only some of its headers: of the seven that weir writes, a reader needs two or three, and copying the
/// others takes a tenth of the sink's CPU.
pub(super) fn record_with(message: &BorrowedMessage<'_>, wanted: &[&str]) -> Record {
    let is_wanted = |header: &Header<'_, &[u8]>| wanted.iter().any(|wanted| header.key.eq_ignore_ascii_case(wanted));
    let own = |header: Header<'_, &[u8]>| (name(header.key), Bytes::copy_from_slice(header.value.unwrap_or_default()));
    let headers =
        message.headers().map_or_else(Headers::new, |headers| headers.iter().filter(is_wanted).map(own).collect());
    with_headers(message, headers)
}

fn with_headers(message: &BorrowedMessage<'_>, headers: Headers) -> Record {
    Record {
        offset: message.offset(),
        time: Timestamp::from_millis(message.timestamp().to_millis().unwrap_or(0)),
        key: message.key().map(Bytes::copy_from_slice),
        value: message.payload().map(Bytes::copy_from_slice),
        headers,
        log: None,
    }
}

/// The partitions of a list.
pub(super) fn partitions(list: &TopicPartitionList) -> Vec<Partition> {
    let partition = |topic: &str, number| Partition { topic: topic.into(), number };
    list.elements().iter().map(|element| partition(element.topic(), element.partition())).collect()
}

/// Offsets with their metadata in librdkafka's form; `id`: of which log they are.
pub(super) fn offset_list(
    offsets: &Offsets,
    id: impl Fn(&Partition) -> Option<TopicId>,
) -> Result<TopicPartitionList, TransactError> {
    let mut list = TopicPartitionList::with_capacity(offsets.len());
    for (partition, _, committed) in offsets {
        let mut element = list.add_partition(&partition.topic, partition.number);
        element
            .set_offset(Offset::Offset(committed.offset))
            .map_err(|error| TransactError::Rebuild(format!("offset of {partition}: {error}")))?;
        element.set_metadata(commit_mark::marked(id(partition), &committed.metadata));
    }
    Ok(list)
}

/// The headers in librdkafka's form.
pub(super) fn headers(outgoing: &Outgoing) -> OwnedHeaders {
    let headers = OwnedHeaders::new_with_capacity(outgoing.headers.len());
    outgoing
        .headers
        .iter()
        .fold(headers, |headers, (key, value)| headers.insert(Header { key, value: Some(value.as_ref()) }))
}

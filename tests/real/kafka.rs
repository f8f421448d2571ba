//! The contract of the seam, and what we rely on in Kafka's behaviour.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::task::JoinHandle;

use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    producer::{BaseRecord, Producer as _, ThreadedProducer},
};
use weir::kafka::{
    Committed, Epoch, Event, GroupConfig, Handover, Instead, KafkaReader, KafkaWriter, Partition, ReadError, Reader,
    TransactError, Writer, admin,
    intake::{Input, Intake},
    ledger,
};

use weir::{
    kafka::Outgoing,
    message::{
        codec,
        envelope::{Envelope, Kind},
    },
    platform::http::BODY_LIMIT,
    runtime::clock::{Clock, Dice, Timestamp},
};

use crate::{
    anew::make_anew,
    stack::{DEADLINE, Follower, address, eventually, kafka, outgoing, produce, topic, unique},
};

fn reader(group: &str, instance: &str, topic: &str) -> KafkaReader {
    let group = GroupConfig {
        group: group.to_owned(),
        instance: instance.to_owned(),
        topics: vec![vec![topic.to_owned()]],
        drain: Duration::from_secs(5),
    };
    KafkaReader::open(&kafka(), group).unwrap()
}

fn intake(reader: KafkaReader, writer: KafkaWriter, dead: &str) -> Intake<KafkaReader, KafkaWriter> {
    Intake::new(reader, writer, Duration::from_millis(50), Instead::new(dead, "weir/test"), Clock::System)
}

async fn assigned(reader: &mut KafkaReader) -> Vec<(Partition, Epoch, Option<Committed>)> {
    loop {
        if let Event::Assigned(assignments) = reader.next().await.unwrap() {
            return assignments.into_iter().map(|a| (a.partition, a.epoch, a.committed)).collect();
        }
    }
}

async fn records(reader: &mut KafkaReader, count: usize) -> Vec<(Partition, Epoch, i64)> {
    let mut found = vec![];
    while found.len() < count {
        if let Event::Records { partition, epoch, records } = reader.next().await.unwrap() {
            found.extend(records.iter().map(|record| (partition.clone(), epoch, record.offset)));
        }
    }
    found
}

fn at(offset: i64, metadata: &str) -> Committed {
    Committed { offset, metadata: metadata.to_owned() }
}

/// Deletes what stands before `offset`, as retention does.
async fn delete_before(topic: &str, offset: i64) {
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", address("WEIR_TEST_KAFKA")).create().unwrap();
    let mut until = TopicPartitionList::new();
    until.add_partition_offset(topic, 0, Offset::Offset(offset)).unwrap();
    admin.delete_records(&until, &AdminOptions::new()).await.unwrap();
}

async fn committed(group: &str, topic: &str) -> Option<i64> {
    admin::lag(&kafka(), group, &[topic.to_owned()]).await.unwrap()[0].committed
}

/// A worker that only follows what is assigned to it, until it is dropped.
struct Worker {
    owned: Arc<Mutex<BTreeSet<Partition>>>,
    task: JoinHandle<()>,
}

impl Worker {
    fn join(group: &str, number: u32, topics: Vec<Vec<String>>) -> Self {
        let group = GroupConfig {
            group: group.to_owned(),
            instance: format!("{group}.{number}"),
            topics,
            drain: Duration::from_secs(5),
        };
        let mut reader = KafkaReader::open(&kafka(), group).unwrap();
        let owned = Arc::new(Mutex::new(BTreeSet::new()));
        let seen = Arc::clone(&owned);
        let task = tokio::spawn(async move {
            loop {
                match reader.next().await.unwrap() {
                    Event::Assigned(new) => seen.lock().unwrap().extend(new.into_iter().map(|new| new.partition)),
                    Event::Revoked(left, _) | Event::Lost(left) => {
                        seen.lock().unwrap().retain(|partition| !left.contains(partition));
                    }
                    Event::Records { .. } | Event::Gone { .. } => {}
                }
            }
        });
        Self { owned, task }
    }

    fn has_of(&self, topic: &str) -> usize {
        self.owned.lock().unwrap().iter().filter(|partition| *partition.topic == *topic).count()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits until each worker has its share of each topic's eight partitions.
async fn are_spread(workers: &[Worker], topics: &[String]) {
    let shares = || -> Vec<Vec<usize>> {
        topics.iter().map(|topic| workers.iter().map(|worker| worker.has_of(topic)).collect()).collect()
    };
    let (least, most) = (8 / workers.len(), 8_usize.div_ceil(workers.len()));
    let is_even = |shares: &Vec<Vec<usize>>| {
        shares.iter().all(|of| of.iter().sum::<usize>() == 8 && of.iter().all(|n| (least..=most).contains(n)))
    };
    let found = tokio::time::timeout(DEADLINE, async {
        while !is_even(&shares()) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    assert!(found.await.is_ok(), "{} workers, of each topic: {:?}", workers.len(), shares());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_topic_is_spread_over_the_workers_at_joins_and_leaves() {
    let (group, topics) = (unique("spread"), [topic("bulk", 8).await, topic("express", 8).await]);
    let apart = || weir::topics::apart(topics.to_vec());
    // As weir did before: all in one subscription. The next start of the same worker is a newer weir's.
    let old = Worker::join(&group, 0, vec![topics.to_vec()]);
    are_spread(std::slice::from_ref(&old), &topics).await;
    drop(old);
    let mut workers = vec![];
    for number in 0..3 {
        workers.push(Worker::join(&group, number, apart()));
        are_spread(&workers, &topics).await;
    }
    // Whoever leaves without a word is missed after a session.
    workers.remove(0);
    are_spread(&workers, &topics).await;
}

#[tokio::test]
async fn a_transaction_commits_for_all_of_a_workers_topics_together() {
    let (output, group) = (topic("out", 1).await, unique("together"));
    let topics = [topic("bulk", 1).await, topic("express", 1).await];
    let config = GroupConfig {
        group: group.clone(),
        instance: group.clone(),
        topics: weir::topics::apart(topics.to_vec()),
        drain: Duration::from_secs(5),
    };
    let mut reader = KafkaReader::open(&kafka(), config).unwrap();
    let writer = KafkaWriter::open(&kafka(), &group).await.unwrap();
    let mut owned = vec![];
    while owned.len() < 2 {
        owned.extend(assigned(&mut reader).await);
    }
    let to = |offset| owned.iter().map(|(p, epoch, _)| (p.clone(), *epoch, at(offset, ""))).collect::<Vec<_>>();
    writer.transact(vec![outgoing(&output, "k", "v")], reader.membership(), to(3)).await.unwrap();
    for topic in &topics {
        assert_eq!(committed(&group, topic).await, Some(3));
    }
    assert_eq!(reader.commit(to(4)).await.unwrap().len(), 2);
    // One of them that is another assignment's is enough to stop it all.
    let mut mixed = to(5);
    mixed[1].1 = Epoch(99);
    let refused = writer.transact(vec![outgoing(&output, "k", "v")], reader.membership(), mixed).await;
    assert!(matches!(refused, Err(TransactError::Aborted(_))), "{refused:?}");
    for topic in &topics {
        assert_eq!(committed(&group, topic).await, Some(4));
    }
}

#[tokio::test]
async fn a_pause_holds_however_many_others_were_asked_for() {
    let (input, group) = (topic("in", 2).await, unique("pauses"));
    let mut reader = reader(&group, &group, &input);
    let mut owned = 0;
    while owned < 2 {
        owned += assigned(&mut reader).await.len();
    }
    // Of partitions that are another's, as after a rebalance that the stage has not heard of yet.
    (2..20_000).for_each(|number| reader.pause(&Partition { topic: input.as_str().into(), number }));
    let paused = Partition { topic: input.as_str().into(), number: 0 };
    reader.pause(&paused);
    // A commit is dealt with after the pauses that were asked for before it.
    reader.commit(vec![]).await.unwrap();
    produce(&input, (0..100).map(|n| n.to_string())).await;
    let end = |lags: Vec<admin::Lag>, number| lags.iter().find(|lag| lag.partition == number).unwrap().end;
    let lags = admin::lag(&kafka(), &group, std::slice::from_ref(&input)).await.unwrap();
    let (held, flowing) = (end(lags.clone(), 0), end(lags, 1));
    assert!(held > 0 && flowing > 0, "{held} and {flowing}");
    let first = records(&mut reader, usize::try_from(flowing).unwrap()).await;
    assert!(first.iter().all(|(partition, ..)| partition.number == 1), "{first:?}");
    reader.resume(&paused);
    let then = records(&mut reader, usize::try_from(held).unwrap()).await;
    assert!(then.iter().all(|(partition, ..)| *partition == paused), "{then:?}");
}

#[tokio::test]
async fn records_and_offsets_become_visible_together_or_not_at_all() {
    let (input, output, group) = (topic("in", 1).await, topic("out", 1).await, unique("group"));
    produce(&input, (0..3).map(|n| n.to_string())).await;
    let mut reader = reader(&group, &group, &input);
    let writer = KafkaWriter::open(&kafka(), &group).await.unwrap();
    let (partition, epoch, before) = assigned(&mut reader).await.remove(0);
    assert_eq!(before, None);
    records(&mut reader, 3).await;

    let write = |text: &str, offsets| writer.transact(vec![outgoing(&output, "k", text)], reader.membership(), offsets);
    let past = vec![(partition.clone(), Epoch(epoch.0 + 1), at(3, ""))];
    assert!(matches!(write("of another assignment", past).await, Err(TransactError::Aborted(_))));
    assert_eq!(committed(&group, &input).await, None);
    write("good", vec![(partition, epoch, at(3, ""))]).await.unwrap();
    assert_eq!(committed(&group, &input).await, Some(3));

    let mut follower = Follower::of(&[output]).await;
    let seen = follower.read_until(1).await;
    assert_eq!(seen.iter().map(|seen| seen.value.as_slice()).collect::<Vec<_>>(), [b"good"]);
}

#[tokio::test]
async fn the_ledger_in_the_commit_comes_back_up_to_4096_bytes_and_a_longer_one_harms_only_its_transaction() {
    let (input, output, group) = (topic("in", 1).await, topic("out", 1).await, unique("group"));
    let longest = "x".repeat(ledger::METADATA_LIMIT);
    {
        let mut reader = reader(&group, &group, &input);
        let writer = KafkaWriter::open(&kafka(), &group).await.unwrap();
        let (partition, epoch, _) = assigned(&mut reader).await.remove(0);
        let write = |metadata: &str| {
            let offsets = vec![(partition.clone(), epoch, at(0, metadata))];
            writer.transact(vec![outgoing(&output, "k", "v")], reader.membership(), offsets)
        };
        let too_long = format!("{longest}x");
        assert!(matches!(write(&too_long).await, Err(TransactError::Aborted(_))));
        write(&longest).await.unwrap();
        // The same for a commit without a transaction.
        let commit = |metadata: &str| reader.commit(vec![(partition.clone(), epoch, at(0, metadata))]);
        assert!(commit(&too_long).await.is_err());
        commit(&longest).await.unwrap();
    }
    let mut again = reader(&group, &group, &input);
    let (_, _, committed) = assigned(&mut again).await.remove(0);
    assert_eq!(committed, Some(at(0, &longest)));
}

#[tokio::test]
async fn a_record_with_the_longest_reply_twice_over_is_written() {
    let (input, output, group) = (topic("in", 1).await, topic("out", 1).await, unique("group"));
    let mut reader = reader(&group, &group, &input);
    let writer = KafkaWriter::open(&kafka(), &group).await.unwrap();
    let (partition, epoch, _) = assigned(&mut reader).await.remove(0);
    // Hardly compressible, as a broker judges the compressed batch and a producer the plain one.
    let dice = Dice::seeded(1);
    let words: Vec<String> = (0..3 * BODY_LIMIT / 32).map(|_| format!("{:032x}", dice.bits())).collect();
    let long = words.concat();
    let record = outgoing(&output, "k", &long);
    writer.transact(vec![record], reader.membership(), vec![(partition, epoch, at(0, ""))]).await.unwrap();
    assert_eq!(Follower::of(&[output]).await.read_until(1).await[0].value.len(), long.len());
}

/// Hardly compressible.
fn noise(bytes: usize) -> String {
    let dice = Dice::seeded(7);
    let words: Vec<String> = (0..bytes / 32).map(|_| format!("{:032x}", dice.bits())).collect();
    words.concat()
}

fn result(topic: &str, id: usize, raw: &str) -> Outgoing {
    let now = Timestamp::from_millis(1_700_000_000_000);
    let result = serde_json::json!({
        "request_id": format!("r{id}"), "source": "s", "item": id.to_string(), "status": "found", "via": "call", "calls": 1,
        "requested_at": now, "fetched_at": now, "latency_ms": 1, "fingerprint": "0000000000000000", "raw": raw,
    });
    let id = format!("r{id}#1");
    let envelope = Envelope { kind: Kind::Result, id: &id, writer: "weir/test", time: now, traceparent: None };
    let codec::Encoded { headers, value } = codec::encode(&envelope, &result);
    Outgoing { topic: topic.into(), key: None, value, headers }
}

#[tokio::test]
async fn a_record_above_a_limit_ends_alone_as_a_dead_letter_that_names_the_limit() {
    let (input, output, dead, group) =
        (topic("in", 1).await, topic("out", 1).await, topic("dead", 1).await, unique("large"));
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", address("WEIR_TEST_KAFKA")).create().unwrap();
    let small = AlterConfig::new(ResourceSpecifier::Topic(&output)).set("max.message.bytes", "300000");
    admin.alter_configs([&small], &AdminOptions::new()).await.unwrap();
    produce(&input, (0..20).map(|n| n.to_string())).await;

    let config = weir::kafka::client::Config { record_limit: bytesize::ByteSize::mib(1), ..kafka() };
    let writer = KafkaWriter::open(&config, &group).await.unwrap();
    let mut intake = intake(reader(&group, "one", &input), writer, &dead);
    let mut open = vec![];
    while open.len() < 20 {
        if let Input::Records(records) = intake.next().await.unwrap() {
            open.extend(records.into_iter().map(|(position, _)| position));
        }
    }
    // Together more than the topic takes at once; the third alone is, and the fourth is more than we send.
    for (number, position) in open.into_iter().enumerate() {
        let size = [20_000, 20_000, 500_000, 2_000_000].get(number).copied().unwrap_or(40_000);
        intake.complete(position, vec![result(&output, number, &noise(size))]);
    }
    intake.flush().await.unwrap();

    assert_eq!(committed(&group, &input).await, Some(20));
    let mut written: Vec<_> =
        Follower::of(&[output]).await.read_until(18).await.iter().map(|r| r.json()["item"].to_string()).collect();
    written.sort();
    assert!(written.len() == 18 && !written.contains(&"\"2\"".to_owned()) && !written.contains(&"\"3\"".to_owned()));
    let mut letters = Follower::of(&[dead]).await;
    let letters: Vec<_> = letters.read_until(2).await.iter().map(crate::stack::Seen::json).collect();
    for (item, limit) in [("2", "300000"), ("3", "kafka.record_limit is 1048576")] {
        let letter = letters.iter().find(|letter| letter["request"]["item"] == item).unwrap();
        let message = letter["message"].as_str().unwrap();
        assert!(message.contains(limit), "{message}");
    }
}

#[tokio::test]
async fn records_above_a_limit_are_told_and_a_job_sets_all_of_them_aside() {
    let (input, output, dead, group) =
        (topic("in", 1).await, topic("out", 1).await, topic("dead", 1).await, unique("job"));
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", address("WEIR_TEST_KAFKA")).create().unwrap();
    let small = AlterConfig::new(ResourceSpecifier::Topic(&output)).set("max.message.bytes", "300000");
    admin.alter_configs([&small], &AdminOptions::new()).await.unwrap();
    produce(&input, (0..40).map(|n| n.to_string())).await;
    let config = weir::kafka::client::Config { record_limit: bytesize::ByteSize::mib(1), ..kafka() };
    let job = weir::kafka::Job::open(&config, &group, &group).await.unwrap();
    let size = |number: usize| match number {
        5 | 6 | 20 | 39 => 500_000,
        11 => 2_000_000,
        _ => 10_000,
    };
    let records: Vec<Outgoing> = (0..40).map(|number| result(&output, number, &noise(size(number)))).collect();
    let partition = Partition { topic: input.as_str().into(), number: 0 };
    let progress = vec![(partition.clone(), Committed { offset: 40, metadata: String::new() })];
    let refused = job.commit(records.clone(), progress.clone()).await.unwrap_err();
    let TransactError::TooLarge(all) = refused else { panic!("{refused}") };
    let told: Vec<usize> = all.iter().map(|why| why.index).collect();
    assert!(!told.is_empty() && told.iter().all(|index| [5, 6, 11, 20, 39].contains(index)), "{told:?}");
    assert_eq!(committed(&group, &input).await, None);

    let origin = |offset| weir::kafka::outbox::Position { partition: partition.clone(), epoch: Epoch(0), offset };
    let records = records.into_iter().zip((0..).map(origin)).collect();
    let instead = weir::kafka::Instead::new(dead.as_str(), "weir/test");
    let aside = job.insist_or_set_aside(records, progress, &instead, Clock::System.now()).await.unwrap();
    assert_eq!(aside.len(), 5);
    assert_eq!(committed(&group, &input).await, Some(40));
    assert_eq!(Follower::of(&[output]).await.read_until(35).await.len(), 35);
    let mut letters = Follower::of(&[dead]).await;
    let offsets: Vec<_> =
        letters.read_until(5).await.iter().map(|seen| seen.json()["origin"]["offset"].clone()).collect();
    assert_eq!(offsets, [5, 6, 11, 20, 39]);
}

#[tokio::test]
async fn a_record_larger_than_a_segment_of_its_topic_ends_as_a_dead_letter_too() {
    let (input, output, dead, group) =
        (topic("in", 1).await, topic("out", 1).await, topic("dead", 1).await, unique("segment"));
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", address("WEIR_TEST_KAFKA")).create().unwrap();
    let small = AlterConfig::new(ResourceSpecifier::Topic(&output));
    let small = small.set("segment.bytes", "1048576").set("max.message.bytes", "4000000");
    for result in admin.alter_configs([&small], &AdminOptions::new()).await.unwrap() {
        result.unwrap();
    }
    produce(&input, ["0".to_owned()]).await;
    let config = weir::kafka::client::Config { record_limit: bytesize::ByteSize::mib(3), ..kafka() };
    let writer = KafkaWriter::open(&config, &group).await.unwrap();
    let mut intake = intake(reader(&group, "one", &input), writer, &dead);
    let position = loop {
        if let Input::Records(records) = intake.next().await.unwrap()
            && let Some((position, _)) = records.into_iter().next()
        {
            break position;
        }
    };
    intake.complete(position, vec![result(&output, 0, &noise(2_000_000))]);
    intake.flush().await.unwrap();
    assert_eq!(committed(&group, &input).await, Some(1));
    let mut letters = Follower::of(&[dead]).await;
    let message = letters.read_until(1).await[0].json()["message"].to_string();
    assert!(message.contains("1048576") && message.contains("segment.bytes"), "{message}");
}

#[tokio::test]
async fn a_second_process_with_the_same_name_ends_the_first() {
    let (input, output, group) = (topic("in", 1).await, topic("out", 1).await, unique("group"));
    let mut first = reader(&group, "same", &input);
    let first_writer = KafkaWriter::open(&kafka(), &group).await.unwrap();
    let (partition, epoch, _) = assigned(&mut first).await.remove(0);

    let mut second = reader(&group, "same", &input);
    let _second_writer = KafkaWriter::open(&kafka(), &group).await.unwrap();
    assigned(&mut second).await;

    let offsets = vec![(partition, epoch, at(0, ""))];
    let late = first_writer.transact(vec![outgoing(&output, "k", "late")], first.membership(), offsets).await;
    assert!(matches!(late, Err(TransactError::Fenced { .. } | TransactError::Aborted(_))), "{late:?}");
    let end = eventually("the first reader is fenced", async || first.next().await.err()).await;
    assert!(matches!(&end, ReadError::Fenced { name, .. } if name == "same"), "{end:?}");
    assert!(end.to_string().contains("[instance]"), "{end}");
    assert!(Follower::of(&[output]).await.read().is_empty());
}

#[tokio::test]
async fn a_partition_that_moves_takes_its_finished_work_along() {
    let (input, output, group) = (topic("in", 4).await, topic("out", 1).await, unique("group"));
    produce(&input, (0..40).map(|n| n.to_string())).await;
    let writer = KafkaWriter::open(&kafka(), &unique("w1")).await.unwrap();
    let mut first = intake(reader(&group, "one", &input), writer, "weir.dead");
    let mut open = vec![];
    while open.len() < 40 {
        if let Input::Records(records) = first.next().await.unwrap() {
            open.extend(records.into_iter().map(|(position, _)| position));
        }
    }

    // Every second record has its outcome; when partitions leave, the rest of them is given up.
    let second = tokio::spawn({
        let mut second = reader(&group, "two", &input);
        async move { (assigned(&mut second).await, second) }
    });
    let moved = loop {
        match first.next().await.unwrap() {
            Input::Leaving(partitions) => {
                for (index, position) in open.iter().enumerate() {
                    if !partitions.contains(&position.partition) {
                        continue;
                    }
                    if index % 2 == 0 {
                        first.complete(position.clone(), vec![outgoing(&output, "k", "done")]);
                    } else {
                        first.give_up(position);
                    }
                }
            }
            Input::Left(partitions) => break partitions,
            Input::Records(_) | Input::Settled => {}
        }
    };
    // The first member goes on taking part while the second gets its partitions.
    while !second.is_finished() {
        let _ = tokio::time::timeout(Duration::from_millis(20), first.next()).await;
    }
    let (assignments, _second) = second.await.unwrap();
    let mut undone = 0;
    for (partition, epoch, committed) in assignments {
        assert!(moved.contains(&partition));
        let mut ledger = ledger::Ledger::new(epoch, committed.as_ref()).unwrap();
        let of_it = open.iter().filter(|position| position.partition == partition);
        undone += of_it.filter(|position| ledger.admit(position.offset) == ledger::Admit::New).count();
    }
    let expected = open.iter().enumerate().filter(|(index, p)| index % 2 == 1 && moved.contains(&p.partition)).count();
    assert_eq!(undone, expected, "the new owner has to do exactly what the old one had not");
}

#[tokio::test]
async fn a_revocation_waits_for_its_answer() {
    let (input, group) = (topic("in", 2).await, unique("group"));
    let mut first = reader(&group, "one", &input);
    assigned(&mut first).await;
    let mut second = reader(&group, "two", &input);
    let handover: Handover = loop {
        if let Event::Revoked(_, handover) = first.next().await.unwrap() {
            break handover;
        }
    };
    let too_early = tokio::time::timeout(Duration::from_secs(2), assigned(&mut second)).await;
    assert!(too_early.is_err() || too_early.unwrap().is_empty(), "the partition moved before the answer");
    drop(handover);
    assert_eq!(assigned(&mut second).await.len(), 1);
}

#[tokio::test]
async fn what_retention_deleted_before_it_was_read_is_named() {
    let (input, group) = (topic("in", 1).await, unique("group"));
    produce(&input, (0..10).map(|n| n.to_string())).await;
    {
        let mut first = reader(&group, &group, &input);
        let (partition, epoch, _) = assigned(&mut first).await.remove(0);
        first.commit(vec![(partition, epoch, at(2, ""))]).await.unwrap();
    }
    delete_before(&input, 6).await;

    let mut again = reader(&group, &group, &input);
    let gone = loop {
        if let Event::Gone { range, .. } = again.next().await.unwrap() {
            break range;
        }
    };
    assert_eq!(gone, 2..6);
    assert_eq!(records(&mut again, 4).await[0].2, 6);
}

#[tokio::test]
async fn retention_that_overtakes_a_running_reader_is_named_and_reading_goes_on() {
    let (input, group) = (topic("in", 1).await, unique("group"));
    produce(&input, (0..3).map(|n| n.to_string())).await;
    let mut reader = reader(&group, &group, &input);
    let (partition, ..) = assigned(&mut reader).await.remove(0);
    records(&mut reader, 3).await;
    reader.pause(&partition);
    tokio::time::sleep(Duration::from_millis(500)).await;
    produce(&input, (3..10).map(|n| n.to_string())).await;
    delete_before(&input, 7).await;
    reader.resume(&partition);

    let gone = async {
        loop {
            if let Event::Gone { range, .. } = reader.next().await.unwrap() {
                return range;
            }
        }
    };
    assert_eq!(tokio::time::timeout(DEADLINE, gone).await.expect("nothing is said to be gone"), 3..7);
    let next = tokio::time::timeout(DEADLINE, records(&mut reader, 3)).await.expect("reading does not go on");
    assert_eq!(next[0].2, 7);
}

#[tokio::test]
async fn a_commit_beyond_the_end_of_the_log_ends_reading_and_says_so() {
    let (input, group) = (topic("in", 1).await, unique("group"));
    produce(&input, (0..3).map(|n| n.to_string())).await;
    {
        let mut first = reader(&group, &group, &input);
        let (partition, epoch, _) = assigned(&mut first).await.remove(0);
        // As after a topic was deleted and made anew.
        first.commit(vec![(partition, epoch, at(1_000, ""))]).await.unwrap();
    }
    let mut again = reader(&group, &group, &input);
    let end = async {
        loop {
            if let Err(error) = again.next().await {
                return error;
            }
        }
    };
    let error = tokio::time::timeout(DEADLINE, end).await.expect("it waits for ever, and says nothing");
    assert!(matches!(error, ReadError::Ledger { .. }), "{error:?}");
    assert!(error.to_string().contains("1000"), "{error}");
}

#[tokio::test]
async fn all_partitions_of_a_topic_made_anew_with_fewer_records_are_begun_anew_without_an_error() {
    let (input, group) = (topic("in", 4).await, unique("group"));
    let mut reader = reader(&group, &group, &input);
    let former: Vec<Epoch> = assigned(&mut reader).await.into_iter().map(|(_, epoch, _)| epoch).collect();
    produce(&input, (0..400).map(|n| n.to_string())).await;
    records(&mut reader, 400).await;
    make_anew(&input, 4).await;
    produce(&input, (0..20).map(|n| n.to_string())).await;
    let mut found = BTreeSet::new();
    let anew = async {
        while found.len() < 20 {
            let new = records(&mut reader, 1).await.into_iter().filter(|(_, epoch, _)| !former.contains(epoch));
            found.extend(new.map(|(partition, _, offset)| (partition, offset)));
        }
    };
    tokio::time::timeout(DEADLINE, anew).await.expect("it is not begun anew");
}

#[tokio::test]
async fn a_pause_of_an_earlier_assignment_does_not_stop_the_next() {
    let (input, group) = (topic("in", 2).await, unique("group"));
    let mut first = reader(&group, "one", &input);
    assigned(&mut first).await;
    let mut second = reader(&group, "two", &input);
    let gone = loop {
        if let Event::Revoked(partitions, _) = first.next().await.unwrap() {
            break partitions.into_iter().next().unwrap();
        }
    };
    assigned(&mut second).await;
    drop(second);
    // Long enough that the partition is assigned to the first again, though its stage has not read that yet.
    tokio::time::sleep(Duration::from_secs(15)).await;
    first.pause(&gone);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(assigned(&mut first).await[0].0, gone);
    produce(&input, (0..20).map(|n| n.to_string())).await;
    let all = tokio::time::timeout(Duration::from_secs(10), records(&mut first, 20)).await;
    assert!(all.is_ok(), "the partition stays paused for ever");
}

#[tokio::test]
async fn an_orderly_restart_under_the_same_name_continues_where_it_was() {
    let (input, group) = (topic("in", 1).await, unique("group"));
    produce(&input, (0..10).map(|n| n.to_string())).await;
    for start in [0, 4] {
        let mut reader = reader(&group, &group, &input);
        let (partition, epoch, _) = assigned(&mut reader).await.remove(0);
        assert_eq!(records(&mut reader, 1).await[0].2, start);
        reader.commit(vec![(partition, epoch, at(4, ""))]).await.unwrap();
    }
}

/// A transactional producer and a member without our safeguards.
struct Bare {
    consumer: BaseConsumer,
    producer: ThreadedProducer<rdkafka::producer::DefaultProducerContext>,
}

impl Bare {
    fn new(group: &str, input: &str) -> Self {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", address("WEIR_TEST_KAFKA"))
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "earliest")
            .set("session.timeout.ms", "6000")
            .create()
            .unwrap();
        consumer.subscribe(&[input]).unwrap();
        let producer: ThreadedProducer<_> = ClientConfig::new()
            .set("bootstrap.servers", address("WEIR_TEST_KAFKA"))
            .set("transactional.id", unique("bare"))
            .create()
            .unwrap();
        producer.init_transactions(Duration::from_secs(10)).unwrap();
        Self { consumer, producer }
    }

    async fn owns(&self, count: usize) {
        eventually("the assignment", async || {
            let _ = self.consumer.poll(Duration::from_millis(20));
            (self.consumer.assignment().unwrap().count() == count).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn the_broker_refuses_an_old_generation_but_takes_any_partition_from_a_fresh_one() {
    let (input, output, group) = (topic("in", 2).await, topic("out", 1).await, unique("group"));
    let first = Bare::new(&group, &input);
    first.owns(2).await;
    let old = first.consumer.group_metadata().unwrap();
    let second = Bare::new(&group, &input);
    eventually("both have one partition", async || {
        let _ = first.consumer.poll(Duration::from_millis(20));
        let _ = second.consumer.poll(Duration::from_millis(20));
        let counts = [&first, &second].map(|bare| bare.consumer.assignment().unwrap().count());
        (counts == [1, 1]).then_some(())
    })
    .await;
    let owned = second.consumer.assignment().unwrap();
    let mut not_mine = TopicPartitionList::new();
    for element in owned.elements() {
        not_mine.add_partition_offset(element.topic(), element.partition(), Offset::Offset(1)).unwrap();
    }

    first.producer.begin_transaction().unwrap();
    first.producer.send(BaseRecord::<str, str>::to(&output).payload("old").key("k")).map_err(|(e, _)| e).unwrap();
    let refused = first.producer.send_offsets_to_transaction(&not_mine, &old, Duration::from_secs(10));
    assert!(refused.is_err(), "an old generation was accepted");
    first.producer.abort_transaction(Duration::from_secs(10)).unwrap();

    // This is why the writer checks epochs under the membership's lock.
    let fresh = first.consumer.group_metadata().unwrap();
    first.producer.begin_transaction().unwrap();
    first.producer.send_offsets_to_transaction(&not_mine, &fresh, Duration::from_secs(10)).unwrap();
    first.producer.commit_transaction(Duration::from_secs(10)).unwrap();
}

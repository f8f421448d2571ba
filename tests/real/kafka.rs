//! The contract of the seam, and what we rely on in Kafka's behaviour.

use std::time::Duration;

use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    producer::{BaseRecord, Producer as _, ThreadedProducer},
};
use weir::kafka::{
    Committed, Epoch, Event, GroupConfig, Handover, KafkaReader, KafkaWriter, Partition, ReadError, Reader,
    TransactError, Writer, admin,
    intake::{Input, Intake},
    ledger,
};

use weir::{platform::http::BODY_LIMIT, runtime::clock::Dice};

use crate::stack::{Follower, address, eventually, kafka, outgoing, produce, topic, unique};

fn reader(group: &str, instance: &str, topic: &str) -> KafkaReader {
    let group = GroupConfig {
        group: group.to_owned(),
        instance: instance.to_owned(),
        topics: vec![topic.to_owned()],
        drain: Duration::from_secs(5),
    };
    KafkaReader::open(&kafka(), group).unwrap()
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

async fn committed(group: &str, topic: &str) -> Option<i64> {
    admin::lag(&kafka(), group, &[topic.to_owned()]).await.unwrap()[0].committed
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
    let mut first = Intake::new(reader(&group, "one", &input), writer, Duration::from_millis(50));
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
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", address("WEIR_TEST_KAFKA")).create().unwrap();
    let mut until = TopicPartitionList::new();
    until.add_partition_offset(&input, 0, Offset::Offset(6)).unwrap();
    admin.delete_records(&until, &AdminOptions::new()).await.unwrap();

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

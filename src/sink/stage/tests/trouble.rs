//! What the sink does about refusals, blocks in doubt, and records that cannot be read.

use super::*;

#[tokio::test(start_paused = true)]
async fn an_insert_that_was_refused_is_counted_before_it_is_repeated_and_after() {
    let sink = start(rows(1));
    sink.tables.get().refuse = Some((164, 0));
    sink.assign(0, 1);
    sink.records(0, 1, 0..1);
    wait(500).await;
    assert_eq!((sink.attempts(), sink.tables.get().counts), (1, 0));
    assert!(sink.condition().contains("error 164"), "{}", sink.condition());
    sink.tables.get().refuse = None;
    wait(1_000).await;
    assert_eq!((sink.attempts(), sink.tables.get().counts), (2, 2));
    assert_eq!(sink.stored(), ["t:0:0-0"], "under the same token");
}

#[tokio::test(start_paused = true)]
async fn refusals_are_met_at_growing_intervals_and_the_intent_is_renewed_before_it_is_too_old() {
    let sink = start(rows(1));
    sink.tables.get().refuse = Some((243, 0));
    sink.assign(0, 1);
    sink.records(0, 1, 0..1);
    wait(300_000).await;
    let attempts = sink.attempts();
    assert!((10..20).contains(&attempts), "{attempts} in five minutes");
    let renewed = sink.commits().iter().filter(|(.., metadata)| metadata == "B1:0-1/1").count();
    assert!(renewed > 5, "{renewed} commits");
}

#[tokio::test(start_paused = true)]
async fn a_block_that_takes_too_much_memory_is_split_until_it_fits() {
    let sink = start(rows(8));
    sink.tables.get().refuse = Some((241, 3));
    sink.assign(0, 1);
    sink.records(0, 1, 0..8);
    wait(30_000).await;
    assert_eq!(sink.stored(), ["t:0:0-1", "t:0:2-3", "t:0:4-5", "t:0:6-7"]);
    assert_eq!(sink.commits().last(), Some(&commit(0, 1, 8, "B1:")));
    let split = commit(0, 1, 0, "B1:0-4/4;4-8/4");
    assert!(sink.commits().contains(&split), "{:?}", sink.commits());
}

#[tokio::test(start_paused = true)]
async fn too_many_parts_make_blocks_larger() {
    let sink = start(rows(1));
    sink.tables.get().refuse = Some((252, 0));
    sink.assign(0, 1);
    sink.records(0, 1, 0..1);
    wait(10_000).await;
    sink.tables.get().refuse = None;
    wait(30_000).await;
    let before = sink.stored().len();
    for offset in 1..9 {
        sink.records(0, 1, offset..offset + 1);
        wait(300).await;
    }
    wait(10_000).await;
    let blocks = sink.stored().len() - before;
    assert!(blocks <= 4, "{blocks} blocks for 8 records");
    assert_eq!(sink.tables.get().stored.iter().map(|(_, rows)| rows).sum::<usize>(), 9);
}

#[tokio::test(start_paused = true)]
async fn a_block_from_an_intent_is_made_again_exactly_and_counted_first() {
    let sink = start(rows(3));
    sink.tables.get().stored.push(("t:0:10-14".to_owned(), 4));
    sink.assign_at(partition(0), 7, Some((10, "B1:10-15/4;15-17/2")));
    sink.send(Event::Records {
        partition: partition(0),
        epoch: Epoch(7),
        records: [10, 11, 13, 14, 15, 16, 17].map(|offset| record(offset, b"1")).to_vec(),
    });
    wait(10).await;
    assert_eq!(sink.stored(), ["t:0:10-14", "t:0:15-16"], "the first was there, the second was not");
    assert_eq!(sink.commits()[0], commit(0, 7, 10, "B1:10-15/4;15-17/2"), "announced anew before anything begins");
    wait(2_000).await;
    assert_eq!(sink.stored().last().unwrap(), "t:0:17-17");
    assert_eq!(sink.commits().last(), Some(&commit(0, 7, 18, "B1:")));
}

#[tokio::test(start_paused = true)]
async fn a_block_of_several_months_that_was_stored_in_part_is_completed() {
    const MONTH: i64 = 31 * 24 * 3_600 * 1_000;
    let sink = start(rows(10));
    // ClickHouse was killed after the first month.
    sink.tables.get().stored.push(("t:0:10-14".to_owned(), 2));
    sink.assign_at(partition(0), 1, Some((10, "B1:10-15/5")));
    let of_month = |offset, month| Record { time: Timestamp::from_millis(month * MONTH), ..record(offset, b"1") };
    let records = (10..15).map(|offset| of_month(offset, i64::from(offset >= 12))).collect();
    sink.send(Event::Records { partition: partition(0), epoch: Epoch(1), records });
    wait(5_000).await;
    assert_eq!((sink.condition(), sink.attempts()), (String::new(), 1));
    assert_eq!(sink.tables.get().stored, [("t:0:10-14".to_owned(), 5)]);
    assert_eq!(sink.commits().last(), Some(&commit(0, 1, 15, "B1:")));
}

#[tokio::test(start_paused = true)]
async fn an_odd_number_of_rows_stops_that_partition_alone_and_says_what_to_do() {
    let sink = start(rows(1));
    sink.tables.get().found = Some(3);
    sink.assign_at(partition(0), 1, Some((10, "B1:10-15/5")));
    sink.assign(1, 1);
    sink.records(0, 1, 10..15);
    sink.records(1, 1, 0..1);
    wait(5_000).await;
    assert_eq!(sink.stored(), ["t:1:0-0"]);
    let told = sink.condition();
    for part in
        ["t/0", "10 to 14", "requests has 3 rows", "where 5 or none are expected", "ALTER TABLE requests DELETE WHERE"]
    {
        assert!(told.contains(part), "{part:?} in {told}");
    }
    // Somebody does so.
    sink.tables.get().found = None;
    wait(31_000).await;
    assert_eq!(sink.stored(), ["t:1:0-0", "t:0:10-14"]);
    assert_eq!(sink.condition(), "");
}

#[tokio::test(start_paused = true)]
async fn records_of_an_intent_that_kafka_no_longer_holds_are_named_unless_their_rows_are_there() {
    for (found, committed) in [(Some(5), true), (Some(0), false)] {
        let sink = start(rows(1));
        sink.tables.get().found = found;
        sink.assign_at(partition(0), 1, Some((10, "B1:10-15/5")));
        sink.send(Event::Gone { partition: partition(0), epoch: Epoch(1), range: 10..13 });
        sink.records(0, 1, 13..16);
        wait(5_000).await;
        let told = sink.condition();
        assert_eq!(sink.stored(), if committed { vec!["t:0:15-15".to_owned()] } else { vec![] }, "{told}");
        assert_eq!(sink.commits().last().unwrap().2 == 16, committed);
        assert_eq!(told.contains("t/0 is stuck at offsets 10 to 14"), !committed, "{told}");
        assert_eq!(told.contains("the offset of the sink's group for this partition to 15"), !committed, "{told}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_is_not_ours_to_read_ends_the_sink() {
    let sink = start(rows(1));
    sink.assign_at(partition(0), 1, Some((10, "B2:10-15/5")));
    let error = sink.task.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("run the newer version"), "{error}");
}

fn result(partition: i32) -> Partition {
    Partition { topic: "r".into(), number: partition }
}

const GOOD: &[u8] = br#"{"request_id":"r1","source":"s","item":"1","status":"absent","via":"call","calls":1,
    "requested_at":1,"fetched_at":2,"latency_ms":3}"#;

#[tokio::test(start_paused = true)]
async fn a_poison_record_becomes_a_dead_letter_with_the_intent_and_the_block_goes_on() {
    let sink = start(rows(4));
    sink.assign_at(result(0), 1, Some((5, "")));
    let values = [(5, GOOD), (6, b"{broken"), (7, GOOD), (9, GOOD)];
    let records = values.map(|(offset, value)| record(offset, value)).to_vec();
    sink.send(Event::Records { partition: result(0), epoch: Epoch(1), records });
    wait(10).await;
    assert_eq!(sink.tables.get().stored, [("r:0:5-9".to_owned(), 3)]);
    let world = sink.log.world();
    assert_eq!(world.records.len(), 1);
    let letter: crate::message::DeadLetter = serde_json::from_slice(&world.records[0].value).unwrap();
    assert_eq!((letter.request_id.as_str(), &*world.records[0].topic), ("r/0/6", "d"));
    assert_eq!(world.committed[&result(0)], Committed { offset: 10, metadata: "B1:".to_owned() });
    assert_eq!(world.commits.len(), 1, "the intent came with the transaction: {:?}", world.commits);
}

#[tokio::test(start_paused = true)]
async fn after_a_crash_a_poison_record_has_no_second_dead_letter() {
    let sink = start(rows(4));
    sink.assign_at(result(0), 2, Some((5, "B1:5-10/2+1!1")));
    let values = [(5, GOOD), (6, b"{broken"), (9, GOOD)];
    let records = values.map(|(offset, value)| record(offset, value)).to_vec();
    sink.send(Event::Records { partition: result(0), epoch: Epoch(2), records });
    wait(10).await;
    assert_eq!(sink.tables.get().stored, [("r:0:5-9".to_owned(), 2)]);
    assert_eq!(sink.log.world().records.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_unreadable_dead_letter_is_a_row_and_never_sent_round_again() {
    let sink = start(rows(2));
    let partition = Partition { topic: "d".into(), number: 0 };
    sink.assign_at(partition.clone(), 1, None);
    let records = vec![record(0, b"{broken"), record(1, b"")];
    sink.send(Event::Records { partition, epoch: Epoch(1), records });
    wait(10).await;
    assert_eq!(
        (sink.tables.get().stored.clone(), sink.log.world().records.len()),
        (vec![("d:0:0-1".to_owned(), 2)], 0)
    );
}

#[tokio::test(start_paused = true)]
async fn nothing_but_poison_makes_blocks_without_an_insert() {
    let sink = start(rows(10));
    sink.assign_at(result(0), 1, None);
    let records = (0..10).map(|offset| record(offset, b"x")).collect();
    sink.send(Event::Records { partition: result(0), epoch: Epoch(1), records });
    wait(10).await;
    assert_eq!((sink.attempts(), sink.log.world().records.len()), (0, 10));
    assert_eq!(sink.log.world().committed[&result(0)].offset, 10);
}

#[tokio::test(start_paused = true)]
async fn blocks_that_were_announced_when_there_was_more_memory_are_made_again_all_the_same() {
    let sink = start(Config { bytes: bytesize::ByteSize::kb(20), ..Config::default() });
    for number in 0..2 {
        sink.assign_at(partition(number), 1, Some((0, "B1:0-200/200;200-400/200")));
    }
    let mut next = [0_i64; 2];
    for _ in 0..10_000 {
        for number in 0..2_i32 {
            let place = usize::try_from(number).unwrap();
            if next[place] < 400 && !sink.log.world().paused.contains(&partition(number)) {
                sink.records(number, 1, next[place]..next[place] + 5);
                next[place] += 5;
            }
        }
        wait(10).await;
    }
    assert_eq!(next, [400, 400], "reading went on; {:?}", sink.stored());
    let mut stored = sink.stored();
    stored.sort();
    assert_eq!(stored, ["t:0:0-199", "t:0:200-399", "t:1:0-199", "t:1:200-399"]);
    assert!(sink.log.world().paused.is_empty());
}

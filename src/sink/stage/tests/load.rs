//! Many records at once: how blocks grow, and how many inserts there are.

use super::*;

#[tokio::test(start_paused = true)]
async fn under_load_there_is_one_commit_for_each_block_and_blocks_grow() {
    let sink = start(rows(10));
    sink.tables.get().insert_takes = Duration::from_millis(500);
    sink.assign(0, 1);
    for step in 0..40 {
        sink.records(0, 1, step * 10..step * 10 + 10);
        wait(50).await;
    }
    wait(5_000).await;
    let blocks = sink.stored().len();
    assert!((4..=12).contains(&blocks), "{:?}", sink.stored());
    assert!(sink.commits().len() <= blocks + 2, "{:?}", sink.commits());
    assert_eq!(sink.tables.get().stored.iter().map(|(_, rows)| rows).sum::<usize>(), 400);
    assert!(sink.tables.get().stored.iter().all(|(_, rows)| *rows <= 80));
}

#[tokio::test(start_paused = true)]
async fn a_block_that_is_only_old_grows_until_its_insert_can_begin() {
    let sink = start(rows(1_000));
    sink.tables.get().insert_takes = Duration::from_secs(3);
    (0..5).for_each(|number| sink.assign(number, 1));
    // Ten records a second and partition: four partitions take all inserts at the first second, until the fourth.
    for step in 0..65 {
        (0..5).for_each(|number| sink.records(number, 1, step..step + 1));
        wait(100).await;
    }
    assert_eq!(sink.tables.get().at_once_max, 4);
    let lengths: Vec<_> = sink.tables.get().stored.iter().map(|(_, rows)| *rows).collect();
    assert_eq!(lengths.len(), 4, "{:?}", sink.stored());
    wait(20_000).await;
    let lengths: Vec<_> = sink.tables.get().stored[4..8].iter().map(|(_, rows)| *rows).collect();
    assert!(lengths.iter().all(|rows| (28..=42).contains(rows)), "three seconds each, or four: {:?}", sink.stored());
    assert!(lengths.iter().any(|rows| *rows >= 39), "the fifth partition's first block: {:?}", sink.stored());
    assert_eq!(sink.tables.get().stored.iter().map(|(_, rows)| rows).sum::<usize>(), 5 * 65);
}

#[tokio::test(start_paused = true)]
async fn old_blocks_are_inserted_one_after_the_other_unless_that_takes_too_long() {
    for (takes, at_once) in [(60, 1), (240, 2), (5_000, 4)] {
        let sink = start(rows(1_000));
        sink.tables.get().insert_takes = Duration::from_millis(takes);
        for number in 0..4 {
            sink.assign(number, 1);
            sink.records(number, 1, 0..10);
        }
        wait(1_760).await;
        assert_eq!(sink.attempts(), 4, "inserts of {takes} ms");
        assert_eq!(sink.tables.get().at_once_max, at_once, "inserts of {takes} ms");
        sink.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn one_insert_per_partition_and_four_in_all() {
    let sink = start(rows(1));
    sink.tables.get().insert_takes = Duration::from_secs(1);
    for number in 0..6 {
        sink.assign(number, 1);
        sink.records(number, 1, 0..1);
        wait(1).await;
        sink.records(number, 1, 1..2);
    }
    wait(500).await;
    assert_eq!(sink.tables.get().at_once, 4);
    assert_eq!(sink.attempts(), 4);
    wait(10_000).await;
    assert_eq!(sink.tables.get().at_once_max, 4);
    for number in 0..6 {
        let done = sink.commits().into_iter().filter(|(n, ..)| *n == number).map(|(_, _, to, _)| to).max();
        assert_eq!(done, Some(2), "partition {number}");
    }
}

#[tokio::test(start_paused = true)]
async fn many_partitions_together_stay_within_the_memory() {
    let sink = start(Config { memory: bytesize::ByteSize::kb(100), ..Config::default() });
    sink.tables.get().away = true;
    for number in 0..5 {
        sink.assign(number, 1);
    }
    let (mut sent, mut round) = (0, 0);
    while sink.log.world().paused.len() < 5 && round < 1_000 {
        for number in 0..5 {
            if !sink.log.world().paused.contains(&partition(number)) {
                sink.records(number, 1, round..round + 1);
                sent += 1;
            }
        }
        round += 1;
        wait(1).await;
    }
    assert!((150..250).contains(&sent), "{sent} records of 0.5 kB for 100 kB");
}

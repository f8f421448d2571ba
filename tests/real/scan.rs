//! Pieces of partitions, as replay, verify and status read them.

use weir::kafka::{
    Partition, Scan,
    scan::{self, Bounds, Piece, Span},
};

use crate::{
    stack::{kafka, topic},
    status::transact,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_brings_what_is_committed_and_ends_behind_the_marks_of_transactions() {
    let topics = [topic("scan", 2).await, topic("scan", 2).await, topic("scan", 2).await];
    // Two records and a mark, one that is rolled back and a mark.
    for topic in &topics {
        for number in 0..2 {
            transact(topic, number, 2, true).await;
            transact(topic, number, 1, false).await;
        }
    }
    let bounds = scan::bounds(&kafka(), &topics).await.unwrap();
    for skip in [0, 2] {
        let piece =
            |Bounds { partition, low, end }: &Bounds| Span { partition: partition.clone(), range: low + skip..*end };
        let mut scan = Scan::open(&kafka(), bounds.iter().map(piece).collect()).unwrap();
        let (mut found, mut ended) = (Vec::new(), Vec::new());
        while let Some(piece) = scan.next().await.unwrap() {
            match piece {
                Piece::Records { partition, records } => {
                    found.extend(records.into_iter().map(|record| (partition.clone(), record.offset)));
                }
                Piece::End(partition) => ended.push(partition),
            }
        }
        let partitions: Vec<_> = bounds.iter().map(|bounds| bounds.partition.clone()).collect();
        let of = |partition: &Partition| (skip..2).map(|offset| (partition.clone(), offset)).collect::<Vec<_>>();
        let expected: Vec<_> = partitions.iter().flat_map(of).collect();
        assert_eq!((found, ended), (expected, partitions));
    }
}

//! What admission makes of requests, against a scripted log.

use crate::{
    cancelled::Cancelled,
    fetch::{
        Config,
        end::End,
        tests::{job, stage},
    },
    message::{BatchId, DeadLetter},
    runtime::clock::Timestamp,
};

#[tokio::test]
async fn a_request_that_waited_for_anothers_answer_when_its_batch_was_cancelled_is_not_called_for() {
    let (cancel, cancelled) = Cancelled::scripted();
    let mut fetch = stage(Config::default()).0.with_cancellations(cancelled);
    let mut job = job(0);
    job.request.batch = Some(BatchId::new("monday").unwrap());
    job.request.requested_at = Some(Timestamp::from_millis(0));
    cancel("monday", 1_000);
    fetch.admission.enlist(job);
    let (_, end) = fetch.admission.pop_uncalled().expect("it has an end");
    let End::Made(records) = end else { panic!("{end:?}") };
    let dead: DeadLetter = serde_json::from_slice(&records[0].value).unwrap();
    assert_eq!(dead.reason, crate::message::Reason::Cancelled);
    assert!(fetch.admission.take_to_call().is_empty());
}

//! The file of tokens: its permissions, its turns, and what is kept.

use super::*;
use crate::{runtime::clock::Timestamp, tokens::Origin};
use secrecy::ExposeSecret as _;

fn source() -> SourceName {
    SourceName::new("ali1688").unwrap()
}

fn alias(name: &str) -> AccountAlias {
    AccountAlias::new(name).unwrap()
}

fn record(revision: u64) -> Record {
    Record {
        revision,
        access_token: Some(format!("at-{revision}").into()),
        refresh_token: None,
        obtained_at: Timestamp::from_millis(0),
        expires_at: Some(Timestamp::from_millis(36_000_000)),
        refresh_expires_at: None,
        origin: Origin::Renewed,
        refused: None,
        replaces: vec!["f".to_owned()],
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn store() -> (tempfile::TempDir, FileStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = FileStore::new(folder.path().join("deep/.weir/tokens.json"));
    (folder, store)
}

#[tokio::test]
async fn what_is_put_is_found_by_another_and_only_its_owner_can_read_it() {
    let (folder, store) = store();
    assert!(store.get(&source(), &alias("one")).await.unwrap().is_none());
    assert!(!folder.path().join("deep").exists(), "who only looks makes nothing");
    assert!(store.put(&source(), &alias("one"), &record(1)).await.unwrap());
    assert!(store.put(&source(), &alias("two"), &record(7)).await.unwrap());
    let other = FileStore::new(store.path.clone());
    let found = other.get(&source(), &alias("one")).await.unwrap().unwrap();
    assert_eq!((found.revision, found.access_token.unwrap().expose_secret()), (1, "at-1"));
    assert_eq!((mode(&store.path), mode(store.folder())), (0o600, 0o700));
    assert_eq!(mode(&folder.path().join("deep/.weir/tokens.json.write.lock")), 0o600);
}

#[tokio::test]
async fn an_older_record_does_not_replace_a_newer_one() {
    let (_folder, store) = store();
    assert!(store.put(&source(), &alias("one"), &record(5)).await.unwrap());
    for revision in [4, 5] {
        assert!(!store.put(&source(), &alias("one"), &record(revision)).await.unwrap());
    }
    assert_eq!(store.get(&source(), &alias("one")).await.unwrap().unwrap().revision, 5);
}

#[tokio::test]
async fn changes_are_what_was_written_since() {
    let (_folder, store) = store();
    let Changes { mark, records: none, .. } = store.changes(&source(), Mark::default()).await.unwrap();
    assert!(none.is_empty());
    store.put(&source(), &alias("one"), &record(1)).await.unwrap();
    let Changes { mark, records: some, .. } = store.changes(&source(), mark).await.unwrap();
    assert_eq!(some.len(), 1);
    assert!(store.changes(&source(), mark).await.unwrap().records.is_empty());
    store.put(&source(), &alias("one"), &record(2)).await.unwrap();
    assert_eq!(store.changes(&source(), mark).await.unwrap().records[0].1.revision, 2);
}

#[tokio::test]
async fn a_file_or_folder_that_others_can_read_is_refused_with_the_way_out() {
    let (_folder, store) = store();
    store.put(&source(), &alias("one"), &record(1)).await.unwrap();
    let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    set(&store.path, 0o640);
    let refusal = store.get(&source(), &alias("one")).await.unwrap_err().to_string();
    assert!(refusal.contains("mode 640") && refusal.contains("chmod 600"), "{refusal}");
    set(&store.path, 0o600);
    set(store.folder(), 0o750);
    for refusal in [
        store.get(&source(), &alias("one")).await.unwrap_err().to_string(),
        store.put(&source(), &alias("one"), &record(2)).await.unwrap_err().to_string(),
    ] {
        assert!(refusal.contains("mode 750") && refusal.contains("chmod 700"), "{refusal}");
    }
}

#[tokio::test]
async fn a_damaged_file_is_named_and_not_quoted() {
    let (_folder, store) = store();
    store.put(&source(), &alias("one"), &record(1)).await.unwrap();
    let text = fs::read_to_string(&store.path).unwrap().replace("\"at-1\"", "at-1");
    private::replace(&store.path, text.as_bytes()).unwrap();
    let refusal = store.get(&source(), &alias("one")).await.unwrap_err().to_string();
    assert!(refusal.contains("line") && refusal.contains("authorise") && !refusal.contains("at-1"), "{refusal}");
}

#[tokio::test]
async fn one_at_a_time_has_the_claim_and_a_dropped_one_is_free() {
    let (_folder, store) = store();
    let other = FileStore::new(store.path.clone());
    let claim = |store: &FileStore| {
        let store = store.clone();
        async move { store.claim(&source(), &alias("one"), Duration::from_secs(1)).await.unwrap() }
    };
    let first = claim(&store).await.unwrap();
    assert!(claim(&other).await.is_none() && claim(&store).await.is_none());
    store.release(first).await;
    assert!(claim(&other).await.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writers_take_turns_so_that_nothing_is_lost() {
    let (_folder, store) = store();
    let writers = (0..16).map(|n| {
        let store = FileStore::new(store.path.clone());
        async move { store.put(&source(), &alias(&format!("a{n}")), &record(1)).await.unwrap() }
    });
    assert!(futures::future::join_all(writers).await.into_iter().all(|kept| kept));
    assert_eq!(store.changes(&source(), Mark::default()).await.unwrap().records.len(), 16);
}

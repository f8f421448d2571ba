//! Real files of accounts that are corrected under a keeper, in virtual time.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use figment::providers::{Format, Toml};
use secrecy::ExposeSecret as _;

use super::*;
use crate::{
    platform::{Denial, Refusal, RefusalKind, Tokens},
    quota::{Cause, Hold, Lease, Limit, Pacing, Scope, memory::Memory},
    runtime::clock::{Clock, Dice, Timestamp},
    tokens::{
        TokenStore,
        file::FileStore,
        keeper::{Purpose, Verdict},
    },
};

struct Rig {
    folder: tempfile::TempDir,
    keeper: Arc<Keeper>,
    quota: Arc<Memory>,
    corrected: Arc<Corrected>,
}

/// A file of two accounts.
fn file(secret: &str, token: &str) -> String {
    let more = if token.is_empty() {
        String::new()
    } else {
        format!("access_token = \"{token}\"\nrefresh_token = \"r-{token}\"\n")
    };
    format!(
        "[[account]]\nalias = \"one\"\napp_key = \"1\"\napp_secret = \"{secret}\"\n{more}\
         [[account]]\nalias = \"two\"\napp_key = \"2\"\napp_secret = \"other-secret\"\n"
    )
}

impl Rig {
    async fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("accounts.toml"), text);
        let config = "name = \"ali1688\"\nkind = \"ali1688\"\naccounts_file = \"accounts.toml\"\nunlimited = true";
        let config = <Toml as Format>::from_str(config).unwrap();
        let source = Source::open(&config, folder.path(), &|_| None).unwrap();
        let store: Arc<dyn TokenStore> = Arc::new(FileStore::new(folder.path().join(".weir/tokens.json")));
        let clock = Clock::simulated(Timestamp::from_millis(1_000_000));
        let call_max = Duration::from_secs(10);
        let keeper = Keeper::new(source.name.clone(), &source.accounts, store, call_max, clock, Dice::seeded(1));
        let keeper = Arc::new(keeper);
        let limit = || Limit::new(10, Duration::from_secs(1), 1).ok();
        let quota = Arc::new(Memory::new(vec![limit(), limit()], Pacing::default()));
        keeper.load(&*quota).await.unwrap();
        let corrected = Corrected::new(&source, |_| None, Arc::clone(&keeper), Arc::clone(&quota) as Arc<dyn Quota>);
        corrected.take().await;
        Self { folder, keeper, quota, corrected: Arc::new(corrected) }
    }

    fn write(&self, text: &str) {
        write(&self.folder.path().join("accounts.toml"), text);
    }

    fn secret(&self) -> String {
        self.keeper.account(0).0.app_secret.expose_secret().to_owned()
    }

    fn token(&self) -> String {
        let (account, _) = self.keeper.account(0);
        account.access_token.as_ref().map_or("none", |token| token.expose_secret()).to_owned()
    }

    async fn renew(&self, access: &str) -> Verdict {
        assert_eq!(self.keeper.purpose(0), Purpose::Renewal);
        let permit = self.keeper.begin(0).await.unwrap();
        let lives = Some(Duration::from_secs(3_600));
        let tokens = Tokens { access_token: access.into(), lives, refresh_token: None, refresh_until: None };
        self.keeper.finish(permit, Ok(tokens)).await
    }

    async fn refused(&self) -> Verdict {
        let (_, generation) = self.keeper.account(0);
        let kind = RefusalKind::Denied(Denial::Token);
        let refusal = Refusal { kind, code: "401".to_owned(), message: String::new() };
        self.keeper.refused(0, generation, &refusal).await
    }
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

#[tokio::test]
async fn a_corrected_secret_is_taken_before_a_resume_and_calls_that_were_signed_before_are_told_apart() {
    let rig = Rig::new(&file("wrong-secret", "")).await;
    let (_, generation) = rig.keeper.account(0);
    let (_, other) = rig.keeper.account(1);
    rig.write(&file("right-secret", ""));
    assert_eq!(rig.secret(), "wrong-secret");
    rig.corrected.before_resume().await;
    assert_eq!(rig.secret(), "right-secret");
    assert!(rig.keeper.is_outdated(0, generation) && !rig.keeper.is_outdated(1, other));
    assert_eq!(rig.keeper.purpose(0), Purpose::Call);
}

#[tokio::test]
async fn what_is_half_written_unreadable_or_gone_changes_nothing_until_it_is_whole() {
    let rig = Rig::new(&file("old-secret", "")).await;
    let whole = file("new-secret", "");
    for end in 1..whole.len() - 1 {
        rig.write(&whole[..end]);
        rig.corrected.take().await;
        let secret = rig.secret();
        assert!(["old-secret", "new-secret"].contains(&secret.as_str()), "{end}: {secret}");
        assert_eq!(secret == "new-secret", whole[..end].contains("new-secret\""), "{end}: {secret}");
    }
    let path = rig.folder.path().join("accounts.toml");
    for mode in [0o644, 0o600] {
        write(&path, &file("third-secret", ""));
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        rig.corrected.take().await;
        assert_eq!(rig.secret(), if mode == 0o644 { "new-secret" } else { "third-secret" });
    }
    fs::remove_file(&path).unwrap();
    rig.corrected.take().await;
    assert_eq!(rig.secret(), "third-secret");
}

#[tokio::test]
async fn a_renewed_token_outlives_a_corrected_secret_and_a_corrected_token_replaces_it() {
    let rig = Rig::new(&file("old-secret", "at-1")).await;
    assert_eq!(rig.refused().await, Verdict::Alive);
    rig.renew("at-2").await;
    rig.write(&file("new-secret", "at-1"));
    rig.corrected.take().await;
    assert_eq!((rig.secret().as_str(), rig.token().as_str()), ("new-secret", "at-2"));
    rig.write(&file("new-secret", "at-9"));
    rig.corrected.take().await;
    assert_eq!(rig.token(), "at-9");
    // Somebody puts the first one back: the vendor has long replaced it.
    rig.write(&file("new-secret", "at-1"));
    rig.corrected.take().await;
    assert_eq!(rig.token(), "at-9");
}

#[tokio::test]
async fn an_account_whose_token_was_refused_for_good_calls_again_with_a_corrected_one() {
    let rig = Rig::new(&file("secret-1", "at-1").replace("refresh_token = \"r-at-1\"\n", "")).await;
    assert_eq!(rig.refused().await, Verdict::Dead);
    let cause = rig.keeper.death(0).unwrap();
    rig.quota.hold(Scope::Account(0), Hold::Disabled, &cause).await;
    rig.quota.hold(Scope::Account(1), Hold::Disabled, &Cause::new("x", Timestamp::from_millis(1))).await;
    assert_eq!(rig.quota.lease(1).await, Lease::Nobody);
    rig.write(&file("secret-1", "at-9"));
    rig.corrected.take().await;
    assert_eq!((rig.token().as_str(), rig.keeper.purpose(0)), ("at-9", Purpose::Call));
    // It may be its turn only in a moment.
    let leased = loop {
        match rig.quota.lease(1).await {
            Lease::NotBefore(at) => tokio::time::sleep_until(at).await,
            leased @ (Lease::Slots(_) | Lease::Nobody) => break leased,
        }
    };
    assert!(matches!(leased, Lease::Slots(_)), "it is released");
}

#[tokio::test]
async fn a_file_that_has_come_to_rest_is_taken_without_a_word_of_anybody() {
    let rig = Rig::new(&file("old-secret", "")).await;
    let corrected = Arc::clone(&rig.corrected);
    let taken = async {
        rig.write(&file("newer-secret", ""));
        while rig.secret() != "newer-secret" {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let taken = timeout(Duration::from_secs(20), taken);
    tokio::select! {
        never = corrected.follow() => match never {},
        taken = taken => taken.unwrap(),
    }
}

//! The keeper against a real file of tokens, in virtual time.

use secrecy::ExposeSecret as _;

use super::*;
use crate::{
    platform::Denial,
    quota::{Lease, Limit, Pacing, memory::Memory},
    tokens::file::FileStore,
};

const HOUR: Duration = Duration::from_secs(3_600);

struct Rig {
    folder: tempfile::TempDir,
    store: Arc<FileStore>,
    clock: Clock,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(FileStore::new(folder.path().join(".weir/tokens.json")));
        Self { folder, store, clock: Clock::simulated(Timestamp::from_millis(1_000_000)) }
    }

    /// One process: a keeper of one account, and its quota.
    async fn process(&self, access: Option<&str>, refresh: Option<&str>) -> Process {
        let account = Account {
            app_key: "1".to_owned(),
            app_secret: "s3cr3t".into(),
            access_token: access.map(Into::into),
            refresh_token: refresh.map(Into::into),
            ..Account::named(alias())
        };
        let store: Arc<dyn TokenStore> = self.store.clone();
        let (clock, dice) = (self.clock.clone(), Dice::seeded(1));
        let keeper = Arc::new(Keeper::new(source(), &[account], store, Duration::from_secs(10), clock, dice));
        let quota = Arc::new(Memory::new(vec![Limit::new(10, Duration::from_secs(1), 1).ok()], Pacing::default()));
        keeper.load(&*quota).await.unwrap();
        Process { keeper, quota }
    }

    async fn record(&self) -> Record {
        self.store.get(&source(), &alias()).await.unwrap().unwrap()
    }
}

struct Process {
    keeper: Arc<Keeper>,
    quota: Arc<Memory>,
}

impl Process {
    fn token(&self) -> String {
        let (account, _) = self.keeper.account(0);
        account.access_token.as_ref().map_or("none", |token| token.expose_secret()).to_owned()
    }

    async fn renew(&self, renewed: Result<Tokens, Refusal>) -> Verdict {
        assert_eq!(self.keeper.purpose(0), Purpose::Renewal);
        let permit = self.keeper.begin(0).await.unwrap();
        self.keeper.finish(permit, renewed).await
    }

    /// A call with the present token is refused.
    async fn refused(&self) -> Verdict {
        let (_, generation) = self.keeper.account(0);
        self.keeper.refused(0, generation, &no(RefusalKind::Denied(Denial::Token))).await
    }

    async fn is_disabled(&self) -> bool {
        self.quota.lease(1).await == Lease::Nobody
    }
}

fn source() -> SourceName {
    SourceName::new("ali1688").unwrap()
}

fn alias() -> AccountAlias {
    AccountAlias::new("one").unwrap()
}

fn tokens(access: &str, refresh: Option<&str>) -> Tokens {
    Tokens {
        access_token: access.into(),
        lives: Some(HOUR),
        refresh_token: refresh.map(Into::into),
        refresh_until: None,
    }
}

fn no(kind: RefusalKind) -> Refusal {
    Refusal { kind, code: "401".to_owned(), message: "no to rt-token-1".to_owned() }
}

#[tokio::test(start_paused = true)]
async fn a_token_is_renewed_when_it_is_due_and_calls_go_on_meanwhile() {
    let rig = Rig::new();
    let one = rig.process(None, Some("rt-token-1")).await;
    assert_eq!(one.renew(Ok(tokens("at-2", Some("rt-2")))).await, Verdict::Alive);
    assert_eq!((one.keeper.purpose(0), one.token().as_str()), (Purpose::Call, "at-2"));
    tokio::time::advance(Duration::from_secs(51 * 60)).await;
    assert_eq!(one.keeper.purpose(0), Purpose::Renewal);
    assert_eq!(one.keeper.purpose(0), Purpose::Call, "one slot is enough");
    let permit = one.keeper.begin(0).await.unwrap();
    assert_eq!(permit.account.refresh_token.as_ref().unwrap().expose_secret(), "rt-2");
    one.keeper.finish(permit, Ok(tokens("at-3", None))).await;
    let record = rig.record().await;
    assert_eq!(record.access_token.unwrap().expose_secret(), "at-3");
    assert_eq!(record.refresh_token.unwrap().expose_secret(), "rt-2", "the one that was sent still counts");
}

#[tokio::test(start_paused = true)]
async fn a_process_with_an_older_token_takes_the_stored_one_and_renews_nothing() {
    let rig = Rig::new();
    let (one, two) =
        (rig.process(Some("at-1"), Some("rt-token-1")).await, rig.process(Some("at-1"), Some("rt-token-1")).await);
    assert_eq!(one.refused().await, Verdict::Alive);
    assert_eq!(one.renew(Ok(tokens("at-2", Some("rt-2")))).await, Verdict::Alive);
    assert_eq!(two.token(), "at-1");
    assert_eq!(two.refused().await, Verdict::Alive);
    assert_eq!((two.keeper.purpose(0), two.token().as_str()), (Purpose::Call, "at-2"));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_was_emptied_gets_the_tokens_that_a_process_holds_and_a_new_process_calls_with_them() {
    let rig = Rig::new();
    let one = rig.process(Some("at-1"), Some("rt-1")).await;
    one.refused().await;
    one.renew(Ok(tokens("at-2", Some("rt-2")))).await;
    one.keeper.look(&*one.quota).await.unwrap();
    std::fs::remove_file(rig.folder.path().join(".weir/tokens.json")).unwrap();
    one.keeper.look(&*one.quota).await.unwrap();
    assert_eq!(rig.record().await.refresh_token.unwrap().expose_secret(), "rt-2");
    assert_eq!(rig.process(Some("at-1"), Some("rt-1")).await.token(), "at-2", "at-1 is dead since the renewal");

    // A process that began in between has tried the configured one, and the vendor has refused to renew that.
    std::fs::remove_file(rig.folder.path().join(".weir/tokens.json")).unwrap();
    let early = rig.process(Some("at-1"), Some("rt-1")).await;
    early.refused().await;
    assert_eq!(early.renew(Err(no(RefusalKind::Denied(Denial::Token)))).await, Verdict::Dead);
    one.keeper.look(&*one.quota).await.unwrap();
    assert_eq!((one.token(), rig.record().await.refused), ("at-2".to_owned(), None));
    early.keeper.look(&*early.quota).await.unwrap();
    assert_eq!((early.token().as_str(), early.keeper.purpose(0)), ("at-2", Purpose::Call));
}

#[tokio::test(start_paused = true)]
async fn while_one_process_renews_the_other_waits_and_finds_the_token() {
    let rig = Rig::new();
    let (one, two) =
        (rig.process(Some("at-1"), Some("rt-token-1")).await, rig.process(Some("at-1"), Some("rt-token-1")).await);
    assert_eq!((one.refused().await, two.refused().await), (Verdict::Alive, Verdict::Alive));
    assert_eq!((one.keeper.purpose(0), two.keeper.purpose(0)), (Purpose::Renewal, Purpose::Renewal));
    let permit = one.keeper.begin(0).await.unwrap();
    assert!(two.keeper.begin(0).await.is_none());
    assert!(matches!(two.keeper.purpose(0), Purpose::Wait(_)));
    one.keeper.finish(permit, Ok(tokens("at-2", None))).await;
    let quota: Arc<dyn Quota> = two.quota.clone();
    let mut watch = tokio::task::JoinSet::new();
    watch.spawn(Arc::clone(&two.keeper).watch(quota));
    two.keeper.changed().await;
    assert_eq!((two.keeper.purpose(0), two.token().as_str()), (Purpose::Call, "at-2"));
}

#[tokio::test(start_paused = true)]
async fn a_token_that_came_between_the_slot_and_the_claim_is_not_renewed_at_once() {
    let rig = Rig::new();
    let (one, two) =
        (rig.process(Some("at-1"), Some("rt-token-1")).await, rig.process(Some("at-1"), Some("rt-token-1")).await);
    assert_eq!((one.refused().await, two.refused().await), (Verdict::Alive, Verdict::Alive));
    assert_eq!(two.keeper.purpose(0), Purpose::Renewal);
    one.renew(Ok(tokens("at-2", None))).await;
    two.keeper.look(&*two.quota).await.unwrap();
    assert!(two.keeper.begin(0).await.is_none());
    assert_eq!((two.keeper.purpose(0), two.token().as_str()), (Purpose::Call, "at-2"));
}

#[tokio::test(start_paused = true)]
async fn a_second_refusal_is_final_until_somebody_authorises_the_app() {
    let rig = Rig::new();
    let one = rig.process(Some("at-1"), Some("rt-token-1")).await;
    assert_eq!(one.refused().await, Verdict::Alive);
    one.renew(Ok(tokens("at-2", None))).await;
    assert_eq!(one.refused().await, Verdict::Dead);
    assert_eq!(one.keeper.purpose(0), Purpose::Nothing);
    assert!(!rig.record().await.refused.unwrap().message.contains("rt-token-1"));

    // The next start knows.
    let two = rig.process(Some("at-1"), Some("rt-token-1")).await;
    assert!(two.is_disabled().await);
    let quota: Arc<dyn Quota> = two.quota.clone();
    let mut watch = tokio::task::JoinSet::new();
    watch.spawn(Arc::clone(&two.keeper).watch(quota));
    let known = rig.record().await;
    let authorised = Record {
        revision: known.revision + 1,
        access_token: Some("at-9".into()),
        origin: Origin::Authorised,
        refused: None,
        ..known
    };
    assert!(rig.store.put(&source(), &alias(), &authorised).await.unwrap());
    two.keeper.changed().await;
    assert!(!two.is_disabled().await);
    assert_eq!((two.keeper.purpose(0), two.token().as_str()), (Purpose::Call, "at-9"));
    // The hold of a process that comes later with it, for the token before.
    let death = one.keeper.death(0).unwrap();
    two.quota.hold(Scope::Account(0), Hold::Disabled, &death).await;
    assert!(!two.is_disabled().await);

    // What was remembered of the death is put into effect before a start looks for tokens.
    let three = rig.process(Some("at-1"), Some("rt-token-1")).await;
    let quota = Memory::new(vec![Limit::new(10, Duration::from_secs(1), 1).ok()], Pacing::default());
    quota.hold(Scope::Account(0), Hold::Disabled, &death).await;
    three.keeper.load(&quota).await.unwrap();
    assert_ne!(quota.lease(1).await, Lease::Nobody);
}

#[tokio::test(start_paused = true)]
async fn a_claim_whose_next_slot_never_comes_is_put_back() {
    let rig = Rig::new();
    let (one, two) =
        (rig.process(Some("at-1"), Some("rt-token-1")).await, rig.process(Some("at-1"), Some("rt-token-1")).await);
    assert_eq!((one.refused().await, two.refused().await), (Verdict::Alive, Verdict::Alive));
    assert_eq!(one.keeper.purpose(0), Purpose::Renewal);
    let permit = one.keeper.begin(0).await.unwrap();
    one.keeper.keep(permit);
    one.keeper.look(&*one.quota).await.unwrap();
    assert_eq!(two.keeper.purpose(0), Purpose::Renewal);
    assert!(two.keeper.begin(0).await.is_none(), "the next slot may come");
    tokio::time::sleep(CLAIM_SPARE).await;
    one.keeper.look(&*one.quota).await.unwrap();
    assert_eq!(two.keeper.purpose(0), Purpose::Renewal);
    assert!(two.keeper.begin(0).await.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_token_that_has_worked_is_renewed_again_when_it_is_refused() {
    let rig = Rig::new();
    let one = rig.process(Some("at-1"), Some("rt-token-1")).await;
    one.refused().await;
    one.renew(Ok(tokens("at-2", None))).await;
    one.keeper.accepted(0, one.keeper.account(0).1);
    assert_eq!(one.refused().await, Verdict::Alive);
    assert_eq!(one.keeper.purpose(0), Purpose::Renewal);
}

#[tokio::test(start_paused = true)]
async fn a_refused_renewal_is_final_and_an_outage_is_not() {
    let rig = Rig::new();
    let one = rig.process(None, Some("rt-token-1")).await;
    assert_eq!(one.renew(Err(no(RefusalKind::Outage))).await, Verdict::Alive);
    assert!(matches!(one.keeper.purpose(0), Purpose::Wait(_)));
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(one.renew(Err(no(RefusalKind::Denied(Denial::Token)))).await, Verdict::Dead);
    assert_eq!(one.keeper.purpose(0), Purpose::Nothing);
    assert!(rig.record().await.refused.is_some());
}

#[tokio::test(start_paused = true)]
async fn an_account_without_a_refresh_token_is_out_of_use_at_its_first_refusal() {
    let rig = Rig::new();
    let one = rig.process(Some("at-1"), None).await;
    assert_eq!(one.keeper.purpose(0), Purpose::Call);
    assert_eq!(one.refused().await, Verdict::Dead);
    // One without any token needs none.
    assert_eq!(Rig::new().process(None, None).await.keeper.purpose(0), Purpose::Call);
}

#[tokio::test(start_paused = true)]
async fn a_changed_configuration_wins_over_the_store_and_over_processes_with_the_old_one() {
    let rig = Rig::new();
    let old = rig.process(Some("at-1"), Some("rt-token-1")).await;
    old.refused().await;
    old.renew(Ok(tokens("at-2", Some("rt-2")))).await;
    assert_eq!(rig.process(Some("at-1"), Some("rt-token-1")).await.token(), "at-2", "the next start finds it");
    let new = rig.process(Some("at-5"), Some("rt-5")).await;
    assert_eq!(new.token(), "at-5");
    assert_eq!(old.refused().await, Verdict::Alive);
    assert_eq!(old.token(), "at-5");
    assert_eq!(rig.process(Some("at-1"), Some("rt-token-1")).await.token(), "at-5");
}

//! What a source's configuration may say, and how it is told what it may not.

use super::*;
use figment::providers::{Format, Toml};

const MINIMAL: &str = r#"
    name = "ali1688"
    kind = "ali1688"
    limit = { calls = 10, per = "1s", burst = 2 }
    account = [{ alias = "one", app_key = "1", app_secret = { env = "S" } }]
"#;

fn open(text: &str) -> Result<Source, String> {
    let config = <Toml as Format>::from_str::<SourceConfig>(text).map_err(|error| error.to_string())?;
    let env = |name: &str| (name == "S").then(|| "secret".to_owned());
    Source::open(&config, Path::new("/nowhere"), &env).map_err(|error| error.to_string())
}

#[test]
fn a_source_needs_a_name_a_kind_and_an_account() {
    let source = open(MINIMAL).unwrap();
    assert_eq!(source.accounts.len(), 1);
    assert_eq!(source.quota().accounts[0].limits, source.account_limit().cloned().into_iter().collect::<Vec<_>>());
    assert_eq!(source.vendor.batch_max(), 1);
}

#[test]
fn the_limit_of_an_account_goes_before_that_of_the_source() {
    let text = MINIMAL.replace("{ env = \"S\" } }", "{ env = \"S\" }, limit = { calls = 3, per = \"1m\" } }");
    let source = open(&text).unwrap();
    assert_eq!(source.quota().accounts[0].limits[0].calls, 3);
}

#[test]
fn several_limits_hold_together_and_some_for_all_accounts() {
    let more = r#"limits = [{ calls = 300, per = "1m", kind = "sliding" }]
                  shared_limits = [{ calls = 50, per = "1s", burst = 5 }]"#;
    let source = open(&format!("{MINIMAL}\n{more}")).unwrap();
    let quota = source.quota();
    assert_eq!(quota.accounts[0].limits.iter().map(|limit| limit.calls).collect::<Vec<_>>(), [10, 300]);
    assert_eq!(quota.source[0].calls, 50);
    let own = MINIMAL
        .replace("{ env = \"S\" } }", "{ env = \"S\" }, limits = [{ calls = 3, per = \"1m\" }], calls_in_flight = 2 }");
    let account = &open(&format!("{own}\n{more}")).unwrap().quota().accounts[0];
    assert_eq!((account.limits.len(), account.limits[0].calls, account.in_flight), (1, 3, Some(2)));
}

#[test]
fn a_wrong_key_is_named_with_what_was_found_and_what_is_allowed() {
    let table = [
        ("url = \"ftp://gw\"", "url is \"ftp://gw\"; it must be http:// or https://"),
        ("url = \"https://gw/?key=1\"", "url is"),
        ("authorise_url = \"auth.1688.com\"", "authorise_url is \"auth.1688.com\"; it must be http:// or https://"),
        ("api = \"alibaba.product.get\"", "api is \"alibaba.product.get\"; it must be namespace/name"),
        ("api = \"a/b/c\"", "api is"),
        ("dialect = \"pool\"", "dialect is \"pool\"; it must be aop, router or item-get"),
        ("dialect = \"item-get\"\nauthorise_url = \"https://a\"", "authorise_url is not a key of this kind"),
        ("dialect = \"router\"\napi = \"a/b\"", "api is \"a/b\"; it must be the API's name"),
        ("sign_method = \"md5\"", "sign_method is not a key of this kind"),
        ("batch_max = 2", "batch_max is \"2\"; it must be from 1"),
        ("version = \"1 2\"", "version is \"1 2\""),
        ("item_param = \"a b\"", "item_param is \"a b\""),
        ("express_share = 1.0", "express_share is \"1\"; it must be above 0 and below 1"),
        ("breaker = { share = 0.0 }", "breaker.share is 0; it must be from 0.01 to 1"),
        ("timeout = \"0s\"", "timeout is 0s; it must be from 1ms to 10m"),
        ("connect_timeout = \"1h\"", "connect_timeout is 1h"),
        ("dns_cache = \"2days\"", "dns_cache is \"2days\"; it must be from 0s"),
        ("calls_in_flight = 0", "calls_in_flight is \"0\"; it must be from 1 to 65536"),
        ("calls_in_flight_per_host = 0", "calls_in_flight_per_host is \"0\""),
        ("address_limit = { calls = 0, per = \"1s\" }", "address_limit is 0 calls per 1s, burst 1"),
        ("limits = [{ calls = 9, per = \"1s\", spread = true }]", "limits is 9 calls per 1s, burst 1 (spread is only"),
        ("columns = { title = \"subject\" }", "columns: \"subject\" is not a JSON pointer"),
        ("columns = { further = { brand = \"b\" } }", "columns: \"b\" is not a JSON pointer"),
        ("columns = { further = { Brand = \"/b\" } }", "columns.further is \"Brand\"; it must be names of 1 to 64"),
        ("colour = \"red\"", "unknown field `colour`"),
        ("budget = { per_day = \"1\" }", "cost_per_call is not set; it must be an amount"),
        ("cost_per_call = 0.1", "expected a string"),
        (
            "cost_per_call = \"2\"\nbudget = { per_batch = \"1.5\" }",
            "budget.per_batch is 1.5, less than one call at 2; it must be at least cost_per_call",
        ),
        ("address_health = { failures = 0 }", "address_health.failures is \"0\"; it must be at least 1"),
        ("address_health = { rest = \"5m\", rest_max = \"1m\" }", "address_health.rest_max is \"1m\"; it must be at"),
        ("accounts_file = \"none.toml\"", "source ali1688: accounts_file: cannot read /nowhere/none.toml"),
    ];
    for (line, expected) in table {
        let message = open(&format!("{MINIMAL}\n{line}")).err().unwrap();
        assert!(message.contains(expected), "{message:?} should say {expected:?}");
    }
}

#[test]
fn a_source_without_accounts_or_of_an_unknown_kind_is_refused() {
    let nobody = open("name = \"a\"\nkind = \"ali1688\"").err().unwrap();
    assert!(nobody.contains("has no account"), "{nobody}");
    let unknown = open("name = \"a\"\nkind = \"ebay\"").err().unwrap();
    assert!(unknown.contains("`ebay`, expected one of `ali1688`, `taobao`"), "{unknown}");
}

fn of_kind(kind: &str, more: &str) -> String {
    MINIMAL.replace("kind = \"ali1688\"", &format!("kind = {kind:?}\n{more}"))
}

#[test]
fn each_kind_and_dialect_has_its_own_defaults_and_batches() {
    let table = [
        ("ali1688", "dialect = \"router\"", "https://api.1688.com/router/json", "product_id", 1),
        ("ali1688", "dialect = \"item-get\"", "alibaba.item.get/2.0", "item_id", 1),
        ("taobao", "", "https://gw.api.taobao.com/router/rest", "num_iids", 20),
        ("taobao", "api = \"taobao.item.seller.get\"", "/router/rest", "num_iid", 1),
        ("taobao", "api = \"taobao.tbk.item.info.get\"", "/router/rest", "num_iids", 40),
        ("taobao", "api = \"taobao.miniapp.items.get\"", "/router/rest", "num_iids", 50),
        ("taobao", "batch_max = 5", "/router/rest", "num_iids", 5),
        ("taobao_reseller", "", "https://o0b.cn/ibrad/taobao/item_get/", "num_iids", 40),
        ("taobao_reseller", "dialect = \"onebound\"", "https://api-gw.onebound.cn/taobao/item_get/", "num_iid", 1),
    ];
    for (kind, more, url, item_param, batch_max) in table {
        let text = of_kind(kind, more);
        let config = <Toml as Format>::from_str::<SourceConfig>(&text).unwrap();
        let found = config.protocol.protocol().url();
        assert!(found.ends_with(url), "{kind} {more}: {found}");
        assert_eq!(config.protocol.shown()["item_param"].as_str(), Some(item_param), "{kind} {more}");
        assert_eq!(open(&text).unwrap().vendor.batch_max(), batch_max, "{kind} {more}");
        // What is shown can be read again, and says the same.
        let shown = serde_json::to_string(&config).unwrap();
        let again: SourceConfig = serde_json::from_str(&shown).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), shown);
    }
}

#[test]
fn calls_in_flight_are_bounded_per_host_and_in_all() {
    let bound = |more: &str| open(&format!("{MINIMAL}\n{more}")).unwrap().calls_in_flight;
    let two = "address = [{ name = \"a\" }, { name = \"b\" }]";
    assert_eq!(bound(""), None);
    let preset = "preset = \"taobao-8-of-10-per-second\"";
    assert_eq!((bound(preset), bound(&format!("{preset}\n{two}"))), (Some(20), Some(40)));
    assert_eq!(bound(&format!("{preset}\ncalls_in_flight = 7")), Some(7));
    assert_eq!(bound(&format!("calls_in_flight_per_host = 4\n{two}")), Some(8));
}

#[test]
fn keys_of_another_kind_are_refused() {
    let table = [
        ("taobao", "dialect = \"pool\"", "dialect is \"pool\"; it must be left out"),
        ("taobao", "api = \"taobao.items.list.get\"", "it must be taobao.item.seller.get,"),
        ("taobao", "version = \"2.0\"", "version is not a key"),
        ("taobao", "columns = { title = \"/title\" }", "columns is not a key"),
        ("taobao", "sign_method = \"sha1\"", "unknown variant `sha1`"),
        ("taobao", "batch_max = 21", "batch_max is \"21\""),
        ("taobao_reseller", "api = \"item_get\"", "api is not a key"),
        ("taobao_reseller", "batch_max = 0", "batch_max is \"0\""),
    ];
    for (kind, line, expected) in table {
        let message = open(&of_kind(kind, line)).err().unwrap();
        assert!(message.contains(expected), "{message:?} should say {expected:?}");
    }
}

#[test]
fn only_a_pool_of_keys_does_without_names_for_them() {
    let nameless = |kind: &str, more: &str| open(&of_kind(kind, more).replace("app_key = \"1\", ", ""));
    assert!(nameless("taobao_reseller", "").is_ok());
    for (kind, more) in [("taobao", ""), ("taobao_reseller", "dialect = \"onebound\""), ("ali1688", "")] {
        let message = nameless(kind, more).err().unwrap();
        assert!(message.contains("app_key \"\" must be"), "{message}");
    }
}

#[test]
fn the_configuration_can_be_shown_without_its_secrets() {
    let config = <Toml as Format>::from_str::<SourceConfig>(MINIMAL).unwrap();
    let shown = serde_json::to_string(&config).unwrap();
    assert!(shown.contains(r#""app_secret":{"env":"S"}"#), "{shown}");
}

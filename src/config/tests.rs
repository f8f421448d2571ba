//! Tables of good and bad configurations.

use super::*;

fn variables(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn with(text: &str, list: &[(&str, &str)]) -> Result<Config, ConfigError> {
    read(Some((Path::new("conf/weir.toml"), text)), variables(list))
}

/// The message of a configuration that must be refused.
fn refusal(text: &str, list: &[(&str, &str)]) -> String {
    match with(text, list) {
        Ok(config) => panic!("{text} {list:?} was taken:\n{}", config.redacted()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn without_file_and_variables_the_defaults_are_in_effect_and_valid() {
    let config = read(None, []).unwrap();
    assert_eq!(config.topics.prefix, "weir");
    assert_eq!(config.validate(), []);
}

#[test]
fn what_an_earlier_example_set_of_life_without_redis_is_passed_over() {
    let earlier =
        "[quota]\non_redis_loss = \"stop\"\nreserve = 0.1\nworkers_max = 4\nshare_for = \"15m\"\nprefix = \"other\"";
    assert_eq!(with(earlier, &[("WEIR_QUOTA__RESERVE", "0.2")]).unwrap().quota.prefix, "other");
}

#[test]
fn a_refusal_names_the_key_the_place_and_what_is_allowed() {
    let table: &[(&str, &[&str])] = &[
        (
            "[fetch]\ncommit_evry = \"1s\"",
            &["fetch.commit_evry", "conf/weir.toml", "no such key", "commit_every, backlog"],
        ),
        ("[ftech]\n", &["ftech", "conf/weir.toml", "kafka", "source"]),
        ("[retry]\nbase = \"soon\"", &["retry.base", "\"soon\"", "\"30s\""]),
        ("[retry]\nbase = 5", &["retry.base", "found 5", "\"30s\""]),
        (
            "[quota]\non_redis_loss = \"share\"\nreserve = 0.1",
            &["quota.on_redis_loss", "conf/weir.toml", "uses up the slots", "until Redis is back"],
        ),
        ("[sink]\nbytes = \"lots\"", &["sink.bytes", "\"lots\"", "\"8MiB\""]),
        ("[sink]\nrows = \"10\"", &["sink.rows", "\"10\"", "whole number"]),
        ("[sink]\nrows = -1", &["sink.rows", "-1", "not negative"]),
        ("[retry]\nattempts = 0", &["retry.attempts", "found 0", "1 to"]),
        ("[retry]\nfactor = 0.5", &["retry.factor", "found 0.5", "1 to"]),
        ("[retry]\nfactor = nan", &["retry.factor", "NaN"]),
        ("[retry]\nbase = \"1h\"", &["retry.cap", "at least retry.base", "1h"]),
        ("[fetch]\ncommit_every = \"1m\"", &["fetch.commit_every", "1m", "1ms to 1s"]),
        ("[topics]\nprefix = \"we ir\"", &["topics.prefix", "\"we ir\"", "a-z"]),
        ("[topics]\noutcome_partitions = 0", &["topics.outcome_partitions", "found 0", "1 to"]),
        (
            "[retry]\npreset = \"002\"",
            &["retry.preset", "\"002\"", "\"standard\"", "\"1688-3-attempts-from-2s\"", "\"001\""],
        ),
        ("[retry]\njitter = \"some\"", &["retry.jitter", "\"some\"", "full", "none"]),
        ("[[retry.rule]]\nclass = [\"outage\"]\nattempts = 0", &["retry.rule.#1.attempts", "found 0"]),
        ("[[retry.rule]]\nsource = \"nobody\"", &["retry.rule.#1.source", "nobody"]),
        ("[kafka]\nbrokers = \"localhost\"", &["kafka.brokers", "\"localhost\"", "host:port"]),
        ("[kafka.properties]\n\"group.id\" = \"mine\"", &["kafka.properties.group.id", "group_prefix"]),
        ("[kafka.properties]\nsasl.password = \"hunter2\"", &["kafka.properties.sasl.password", "must not stand"]),
        ("[clickhouse]\npassword = \"hunter2\"", &["clickhouse.password", "WEIR_CLICKHOUSE__PASSWORD"]),
        ("[clickhouse]\nurl = \"localhost:8123\"", &["clickhouse.url", "http://host:port"]),
        ("[clickhouse]\ndatabase = \"a-b\"", &["clickhouse.database", "\"a-b\"", "letters, digits and _"]),
        ("[clickhouse]\npassword_file = \"nowhere\"", &["clickhouse.password_file", "conf/nowhere"]),
        ("[redis]\nurl = \"redis://u:hunter2@h:1/0\"", &["redis.url", "WEIR_REDIS__URL"]),
        ("[batches]\nwebhook = \"https://hunter2\"", &["batches.webhook", "WEIR_BATCHES__WEBHOOK"]),
        ("[batches]\nauthorization = \"hunter2\"", &["batches.authorization", "WEIR_BATCHES__AUTHORIZATION"]),
        ("[batches]\nsettle = \"0s\"", &["batches.settle", "0s", "1s"]),
        ("[serve]\nlisten = \"off\"", &["serve.listen", "\"off\"", "0.0.0.0:8081"]),
        ("[serve]\nlisten = \"127.0.0.1:8080\"", &["serve.listen", "127.0.0.1:8080", "http.listen"]),
        ("[http]\nlisten = \"8080\"", &["http.listen", "\"8080\"", "127.0.0.1:8080", "off"]),
        ("[log]\nformat = \"xml\"", &["log.format", "\"xml\"", "\"text\", \"json\""]),
        ("[log]\nfilter = \"weir=loud\"", &["log.filter", "weir=loud", "info"]),
        ("[instance]\nname = \"\"", &["instance.name", "a-z"]),
        ("[source]\nname = \"a\"", &["source", "[[source]]"]),
        ("retry = 5", &["retry", "found 5", "a table"]),
        ("[fetch", &["not valid TOML", "line 1"]),
    ];
    for (text, expected) in table {
        let message = refusal(text, &[]);
        for part in *expected {
            assert!(message.contains(part), "{text:?}: {message:?} should say {part:?}");
        }
        assert!(!message.contains("hunter2"), "{text:?}: {message:?} shows the secret");
    }
}

#[test]
fn all_problems_are_listed_at_once() {
    let text =
        "[retry]\nbase = \"soon\"\nattempts = 0\ncolour = 1\n[fetch]\nbacklog = \"many\"\n[topics]\nprefix = \"\"\n";
    let message = refusal(text, &[("WEIR_SINK__ROWS", "x")]);
    for key in
        ["6 problems", "retry.base", "retry.attempts", "retry.colour", "fetch.backlog", "topics.prefix", "sink.rows"]
    {
        assert!(message.contains(key), "{message} should name {key}");
    }
}

#[test]
fn a_source_is_named_by_its_name_and_all_that_is_wrong_with_it_is_listed() {
    let text = "[[source]]\nname = \"a b\"\nkind = \"ebay\"\nlimit = { calls = 1 }\n[[source]]\nkind = \"ali1688\"\n";
    let message = refusal(text, &[]);
    for part in
        ["source.a b.name", "source.a b.kind", "\"ebay\"", "source.a b.limit.per", "source.#2.name", "is missing"]
    {
        assert!(message.contains(part), "{message} should say {part}");
    }
}

#[test]
fn a_variable_overrides_the_file_and_is_named_when_it_is_wrong() {
    let config =
        with("[retry]\nattempts = 3\n", &[("WEIR_RETRY__ATTEMPTS", "7"), ("WEIR_RETRY__FACTOR", "1.5")]).unwrap();
    assert_eq!((config.retry.policy.attempts, config.retry.policy.factor), (7, 1.5));
    for (name, value, expected) in [
        ("WEIR_RETRY__ATTEMPTS", "many", ["retry.attempts", "variable WEIR_RETRY__ATTEMPTS", "\"many\""]),
        ("WEIR_RETRY__BASES", "1s", ["retry.bases", "variable WEIR_RETRY__BASES", "attempts, base"]),
        ("WEIR_RETRY_BASE", "1s", ["retry.base", "variable WEIR_RETRY_BASE", "WEIR_RETRY__BASE"]),
        ("WEIR_SOURCE__URL", "x", ["source", "variable WEIR_SOURCE__URL", "file only"]),
    ] {
        let message = refusal("", &[(name, value)]);
        for part in expected {
            assert!(message.contains(part), "{message:?} should say {part:?}");
        }
    }
}

#[test]
fn variables_of_others_and_empty_ones_are_let_be() {
    with(
        "",
        &[("WEIR_FETCH_PORT", "tcp://10.0.0.1:80"), ("WEIR_CONFIG", "x"), ("WEIR_RETRY__ATTEMPTS", ""), ("HOME", "/")],
    )
    .unwrap();
}

#[test]
fn a_text_of_digits_in_a_variable_stays_a_text_where_one_is_wanted() {
    use secrecy::ExposeSecret;
    let config = with("", &[("WEIR_CLICKHOUSE__PASSWORD", "12345"), ("WEIR_INSTANCE__NAME", "007")]).unwrap();
    assert_eq!(config.clickhouse.password.unwrap().expose_secret(), "12345");
    assert_eq!(config.instance.name, "007");
}

#[test]
fn properties_of_kafka_are_taken_in_every_form() {
    let text =
        "[kafka.properties]\n\"security.protocol\" = \"SASL_SSL\"\nsocket.timeout.ms = 5000\nsasl.username = \"u\"\n";
    let config = with(text, &[("WEIR_KAFKA__PROPERTIES__SASL_PASSWORD", "p")]).unwrap();
    let found: Vec<_> = config.kafka.properties.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let expected = [
        ("sasl.password", "p"),
        ("sasl.username", "u"),
        ("security.protocol", "SASL_SSL"),
        ("socket.timeout.ms", "5000"),
    ];
    assert_eq!(found, expected);
}

#[test]
fn paths_are_meant_from_where_the_file_is() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("password"), "hunter2\n").unwrap();
    let path = folder.path().join("weir.toml");
    let config = read(Some((&path, "[clickhouse]\npassword_file = \"password\"\n")), []).unwrap();
    assert_eq!(config.clickhouse.password_file.as_deref(), Some(folder.path().join("password").as_path()));
    assert_eq!(config.folder(), folder.path());
}

#[test]
fn the_print_holds_no_secret_and_is_read_back_as_it_was() {
    let secrets = [
        ("WEIR_CLICKHOUSE__PASSWORD", "hunter2"),
        ("WEIR_REDIS__URL", "redis://user:hunter2@cache:6379/0"),
        ("WEIR_KAFKA__PROPERTIES__SASL_PASSWORD", "hunter2"),
        ("WEIR_KAFKA__PROPERTIES__SSL_KEY_PASSWORD", "hunter2"),
        ("WEIR_KAFKA__PROPERTIES__SASL_OAUTHBEARER_CLIENT_SECRET", "hunter2"),
        ("WEIR_KAFKA__PROPERTIES__SASL_JAAS_CONFIG", "… password=hunter2"),
    ];
    let config = with("[retry]\nattempts = 3\n[http]\nlisten = \"off\"\n", &secrets).unwrap();
    let printed = config.redacted();
    assert!(!printed.contains("hunter2"), "{printed}");
    assert!(!format!("{config:?}").contains("hunter2"), "{config:?}");
    for part in ["attempts = 3", "listen = \"off\"", "password = \"***\"", "redis://user:***@cache:6379/0"] {
        assert!(printed.contains(part), "{printed} should show {part}");
    }
    let lines = printed.lines().filter(|line| !line.contains("***")).collect::<Vec<_>>().join("\n");
    let again = with(&lines, &[]).unwrap();
    assert_eq!(again.redacted().replace("***", ""), lines.clone() + "\n", "{printed}");
}

#[test]
fn a_secret_of_the_wrong_type_is_not_shown() {
    let message = refusal("[clickhouse]\npassword = 48151623\n", &[]);
    assert!(message.contains("clickhouse.password") && !message.contains("48151623"), "{message}");
}

const EXAMPLE: &str = include_str!("../../deploy/config/weir.example.toml");

/// The example with everything switched on that is commented out. What explains is a sentence, no assignment.
fn switched_on() -> String {
    let is_toml = |line: &str| {
        let key = line.split_once(" = ").map_or("", |(key, _)| key);
        line.starts_with('[') || (!key.is_empty() && !key.contains(' '))
    };
    let on = |line: &'static str| match line.strip_prefix("# ") {
        Some(rest) if is_toml(rest) => rest,
        _ => line,
    };
    EXAMPLE.lines().map(on).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_example_says_what_the_defaults_are() {
    let example = with(EXAMPLE, &[]).unwrap();
    assert_eq!(example.redacted(), Config { file: example.file.clone(), ..Config::default() }.redacted());
}

#[test]
fn the_example_has_every_key() {
    let text = switched_on();
    for key in print::keys().iter().filter_map(|key| key.split_once('.')) {
        let section = text.split_once(&format!("[{}]\n", key.0)).map_or("", |(_, rest)| rest);
        let section = section.split("\n[").next().unwrap_or_default();
        let has = |line: &str| line.starts_with(&format!("{} =", key.1));
        // Properties are a table of their own.
        assert!(section.lines().any(has) || key == ("kafka", "properties"), "[{}] lacks {}", key.0, key.1);
    }
}

#[test]
fn the_source_in_the_example_is_valid_and_has_every_key_with_its_default() {
    let text = switched_on()
        .replace("password = \"\"\n", "")
        .replace("key = \"\"\n", "")
        .replace("webhook = \"\"\n", "")
        .replace("authorization = \"\"\n", "")
        .replace("password_file = \"clickhouse.password\"\n", "");
    let other = "\n[[source]]\nname = \"ali1688-reseller\"\nkind = \"ali1688\"\n";
    let example = with(&format!("{text}{other}"), &[]).unwrap();
    let source = toml::Table::try_from(&example.sources[0]).unwrap();
    let bare = "[[source]]\nname = \"ali1688\"\nkind = \"ali1688\"\n";
    let default = toml::Table::try_from(&with(bare, &[]).unwrap().sources[0]).unwrap();
    for (key, value) in &default {
        match (value, &source[key]) {
            (toml::Value::Table(value), toml::Value::Table(found)) => {
                value.iter().for_each(|(inner, value)| assert_eq!(found.get(inner), Some(value), "{key}.{inner}"));
            }
            (value, found) => assert_eq!(found, value, "{key}"),
        }
    }
    // A key that serde skips because it is unset has no default: those that the source may have, by its own refusal.
    let refusal = refusal(&format!("{bare}colour = 1\n[source.columns]\ncolour = 1\n"), &[]);
    let allowed = |message: &str| message.split("allowed here: ").skip(1).map(str::to_owned).collect::<Vec<_>>();
    let lists = allowed(&refusal);
    assert_eq!(lists.len(), 2, "{refusal}");
    for key in lists.iter().flat_map(|list| list.lines().next().unwrap_or_default().split(", ")) {
        assert!(
            text.lines().any(|line| line.starts_with(&format!("{key} ="))
                || line == format!("[source.{key}]")
                || line == format!("[[source.{key}]]")),
            "{key}"
        );
    }
}

#[test]
fn the_demo_is_valid() {
    let demo = with(include_str!("../../deploy/config/demo.toml"), &[]).unwrap();
    assert_eq!(demo.instance.name, "demo");
    assert_eq!(demo.sources[0].common.limit.as_ref().map(|limit| (limit.calls, limit.burst)), Some((10, 5)));
}

//! The built binary: exit codes, and messages that a person can act on. Needs no server.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// A port that nobody listens on: it needs privileges that no test has.
const NOWHERE: &str = "127.0.0.1:1";

struct Weir(TempDir);

impl Weir {
    fn new(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("weir.toml"), config).unwrap();
        Self(folder)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn run(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        // Whatever the surroundings set must not reach the test.
        let ours = std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("WEIR_"));
        for (name, _) in ours {
            command.env_remove(name);
        }
        command.args(arguments).envs(variables.iter().copied()).current_dir(self.0.path());
        Ran(command.output().unwrap())
    }
}

impl Weir {
    /// The same with a text on standard input.
    fn fed(&self, arguments: &[&str], text: &str) -> Ran {
        use std::io::Write as _;
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        command.args(arguments).current_dir(self.0.path()).env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // What is refused at once does not read it.
        let _ = child.stdin.take().unwrap().write_all(text.as_bytes());
        Ran(child.wait_with_output().unwrap())
    }
}

struct Ran(Output);

impl Ran {
    fn code(&self) -> i32 {
        self.0.status.code().unwrap_or(-1)
    }

    fn text(&self) -> String {
        format!("{}{}", String::from_utf8_lossy(&self.0.stdout), String::from_utf8_lossy(&self.0.stderr))
    }

    fn expect(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code(), code, "{}", self.text());
        for part in parts {
            assert!(self.text().contains(part), "{:?} should say {part:?}", self.text());
        }
    }
}

const SOURCE: &str = r#"
[[source]]
name = "ali1688"
kind = "ali1688"
account = [{ alias = "one", app_key = "1", app_secret = { env = "ONE_SECRET" } }]
limit = { calls = 10, per = "1s" }
"#;

#[test]
fn help_explains_and_is_no_failure() {
    let weir = Weir::new("");
    weir.run(&["--help"], &[]).expect(0, &["weir enqueue ids.txt", "Exit codes"]);
    for command in ["run", "enqueue", "status", "quota", "query", "check"] {
        weir.run(&[command, "--help"], &[]).expect(0, &["Examples:", "weir "]);
    }
}

#[test]
fn a_wrong_command_line_ends_with_64() {
    let weir = Weir::new(SOURCE);
    weir.run(&["dance"], &[]).expect(64, &["dance"]);
    weir.run(&["run", "--role", "cook"], &[]).expect(64, &["cook", "fetch"]);
    weir.run(&["enqueue", "ids.txt"], &[]).expect(64, &["--source"]);
    weir.run(&["enqueue", "ids.txt", "--source", "ebay"], &[]).expect(64, &["\"ebay\"", "ali1688"]);
    weir.run(&["query", " "], &[]).expect(64, &["no SQL"]);
    weir.run(&["quota", "set", "ali1688", "--pace", "2"], &[]).expect(64, &["'2'", "from 0.1% to 100%"]);
    weir.run(&["quota", "pause", "ali1688", "--for", "ever"], &[]).expect(64, &["ever", "10m"]);
}

#[test]
fn an_invalid_configuration_ends_with_64_and_says_all_that_is_wrong() {
    let weir = Weir::new("[retry]\nattempts = 0\nbase = \"soon\"\n");
    for command in [&["check"][..], &["run"], &["topics", "list"]] {
        weir.run(command, &[]).expect(64, &["2 problems", "retry.attempts", "retry.base", "\"soon\""]);
    }
    weir.run(&["--config", "none.toml", "check"], &[]).expect(64, &["none.toml", "No such file"]);
    weir.run(&["check"], &[("WEIR_KAFKA__BROKRES", "x")]).expect(64, &["WEIR_KAFKA__BROKRES", "brokers"]);
}

#[test]
fn an_offline_check_prints_what_is_in_effect_without_secrets() {
    let weir = Weir::new(SOURCE);
    let secrets = [
        ("ONE_SECRET", "hunter2"),
        ("WEIR_CLICKHOUSE__PASSWORD", "hunter2"),
        ("WEIR_REDIS__URL", "redis://u:hunter2@h:6379"),
        ("WEIR_KAFKA__PROPERTIES__SASL_PASSWORD", "hunter2"),
    ];
    let ran = weir.run(&["check", "--offline"], &secrets);
    ran.expect(0, &["\"sasl.password\" = \"***\"", "redis://u:***@h", "[topics]", "source ali1688", "1 account"]);
    assert!(!ran.text().contains("hunter2"), "{}", ran.text());
}

#[test]
fn a_source_whose_secret_is_missing_is_an_invalid_configuration() {
    Weir::new(SOURCE).run(&["check", "--offline"], &[]).expect(64, &["source ali1688", "WRONG", "ONE_SECRET"]);
}

#[test]
fn servers_that_cannot_be_reached_end_a_check_with_69_and_are_all_named() {
    let weir = Weir::new(SOURCE);
    let variables = [
        ("ONE_SECRET", "hunter2"),
        ("WEIR_KAFKA__BROKERS", NOWHERE),
        ("WEIR_CLICKHOUSE__URL", "http://127.0.0.1:1"),
        ("WEIR_REDIS__URL", "redis://127.0.0.1:1"),
    ];
    weir.run(&["check", "--quiet"], &variables)
        .expect(69, &["Kafka", NOWHERE, "ClickHouse", "Redis", "Is it running?"]);
    weir.run(&["query", "SELECT 1"], &variables).expect(69, &["error: ClickHouse unreachable", "clickhouse.url"]);
}

#[test]
fn a_file_of_ids_that_is_not_there_fails_before_anything_is_sent() {
    let weir = Weir::new(SOURCE);
    weir.run(&["enqueue", "ids.txt", "--source", "ali1688"], &[]).expect(1, &["cannot read ids.txt", "No such file"]);
    assert!(Path::new(&weir.file("ids.txt", "1\n")).exists());
    let nowhere = [("WEIR_KAFKA__BROKERS", NOWHERE)];
    weir.run(&["enqueue", "ids.txt", "--source", "ali1688"], &nowhere).expect(69, &[NOWHERE, "Is it running?"]);
    weir.run(&["quota"], &nowhere).expect(69, &[NOWHERE, "Is it running?"]);
}

#[test]
fn simulate_needs_no_configuration_and_a_closed_pipe_is_no_failure() {
    let weir = Weir::new("this is no TOML");
    weir.run(&["simulate", "ids", "--count", "3"], &[]).expect(0, &[]);
}

#[test]
#[allow(clippy::disallowed_methods, reason = "the time of a process of its own cannot be paused")]
fn a_hangup_ends_a_process_in_good_order_and_with_a_word_unless_it_was_started_to_survive_it() {
    for (nohup, survives) in [(false, false), (true, true)] {
        // The tests themselves may have been started by nohup, and what they start inherits that.
        let mut command = Command::new(if nohup { "nohup" } else { "env" });
        if !nohup {
            command.arg("--default-signal=HUP");
        }
        command.arg(env!("CARGO_BIN_EXE_weir"));
        let log = tempfile::NamedTempFile::new().unwrap();
        let output = || log.reopen().unwrap();
        let mut child = command
            .args(["simulate", "--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(output())
            .stderr(output())
            .spawn()
            .unwrap();
        let said = || std::fs::read_to_string(log.path()).unwrap();
        let signal = |signal: &str| Command::new("kill").arg(signal).arg(child.id().to_string()).status().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !said().contains("127.0.0.1:") {
            assert!(Instant::now() < deadline, "{}", said());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(signal("-HUP").success());
        if survives {
            std::thread::sleep(Duration::from_millis(500));
            assert!(signal("-TERM").success());
        }
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(0), "{status:?} {}", said());
        assert_eq!(said().contains("SIGHUP"), !survives, "{}", said());
    }
}

#[test]
fn a_replay_that_cannot_be_meant_is_refused_before_any_server_is_asked() {
    let weir = Weir::new(&format!("[kafka]\nbrokers = \"{NOWHERE}\"\n"));
    let table: [(&[&str], &[&str]); 8] = [
        (&["replay"], &["--topic"]),
        (&["replay", "--topic", "results", "--into", "requests"], &["--topic requests instead"]),
        (&["replay", "--topic", "results", "--class", "outage"], &["only failures and dead letters"]),
        (&["replay", "--topic", "dead", "--reason", "tired"], &["tired", "exhausted"]),
        (&["replay", "--topic", "dead", "--from", "yesterday"], &["\"yesterday\" is not a time", "2 days ago"]),
        (&["replay", "--topic", "dead", "--into", "a b"], &["DATABASE.TABLE"]),
        (&["replay", "--from-table", "observations"], &["name another one"]),
        (&["verify", "--since", "lately"], &["\"lately\" is not a time"]),
    ];
    for (arguments, parts) in table {
        weir.run(arguments, &[]).expect(64, parts);
    }
    weir.run(&["redrive", "--source", "taobao"], &[]).expect(64, &["no source \"taobao\""]);
}

const WITH_FILE: &str = r#"
[[source]]
name = "ali1688"
kind = "ali1688"
accounts_file = "accounts.toml"
"#;

#[test]
fn an_account_is_added_with_its_secrets_from_standard_input_and_never_twice() {
    use std::os::unix::fs::PermissionsExt as _;
    let weir = Weir::new(WITH_FILE);
    let add = |alias: &str, secrets: &str| {
        weir.fed(&["account", "add", "ali1688", "--alias", alias, "--app-key", "1000001"], secrets)
    };
    add("one", "hunter\"22\nat-22\n").expect(0, &["one is added", "weir account test ali1688 one"]);
    let path = weir.0.path().join("accounts.toml");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let commented = format!("# mine\n{}# the end", std::fs::read_to_string(&path).unwrap());
    std::fs::write(&path, &commented).unwrap();
    add("one", "hunter22\n").expect(64, &["has an account one already", "--alias"]);
    add("o ne", "hunter22\n").expect(64, &["o ne"]);
    add("two", "\n").expect(64, &["no app secret"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), commented, "what is refused changes nothing");
    add("two", "hunter22\n\nrt-22\n").expect(0, &["two is added", "share one quota"]);
    assert!(std::fs::read_to_string(&path).unwrap().starts_with(&commented));
    let listed = weir.run(&["account", "list"], &[]);
    listed.expect(0, &["one", "two", "1000001", "as configured", "yes"]);
    assert!(["hunter", "-22"].iter().all(|secret| !listed.text().contains(secret)), "{}", listed.text());
}

#[test]
fn an_authorise_link_is_printed_and_what_cannot_be_meant_is_refused() {
    let weir = Weir::new(SOURCE);
    let secret = [("ONE_SECRET", "hunter2")];
    let authorise = |source, alias| {
        weir.run(&["account", "authorise", source, alias, "--redirect-uri", "https://shop.example/back"], &secret)
    };
    let link = authorise("ali1688", "one");
    link.expect(0, &["https://auth.1688.com/oauth/authorize?client_id=1&site=1688", "&_aop_signature=", "--code"]);
    assert!(!link.text().contains("hunter2"));
    authorise("ali1688", "nobody").expect(64, &["no account nobody", "weir account list"]);
    authorise("ebay", "one").expect(64, &["no source \"ebay\"", "ali1688"]);
    weir.run(&["account", "add", "ali1688", "--alias", "x", "--app-key", "2"], &secret).expect(64, &["accounts_file"]);
    weir.run(&["account", "test", "ali1688", "one", "--item", ""], &secret).expect(64, &["--item"]);
    let redis =
        [("ONE_SECRET", "hunter2"), ("WEIR_TOKENS__STORE", "redis"), ("WEIR_REDIS__URL", "redis://127.0.0.1:1")];
    weir.run(&["account", "list"], &redis).expect(64, &["tokens.store", "WEIR_TOKENS__KEY", "openssl"]);
}

/// What a process answers there: the status line, and all of it.
fn answer(port: u16, path: &str) -> Option<(String, String)> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let status = text.split(' ').nth(1)?.to_owned();
    Some((status, text))
}

#[test]
#[allow(clippy::disallowed_methods, reason = "the time of a process of its own cannot be paused")]
fn items_and_health_have_a_listener_each_or_share_the_old_one() {
    let port = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (public, admin) = (port(), port());
    let config = |serve: &str| {
        format!("[kafka]\nbrokers = \"{NOWHERE}\"\n[http]\nlisten = \"127.0.0.1:{admin}\"\n{serve}\n{SOURCE}")
    };
    let apart = config(&format!("[serve]\nlisten = \"127.0.0.1:{public}\""));
    // An id that is none is refused without asking anybody.
    let items = "/items/ali1688/1?max_age=soon";
    for (text, expected) in [
        (
            apart.as_str(),
            [
                (public, items, "400"),
                (public, "/health", "200"),
                (public, "/metrics", "404"),
                (public, "/ready", "404"),
                (admin, items, "404"),
                (admin, "/metrics", "200"),
                (admin, "/ready", "503"),
            ]
            .to_vec(),
        ),
        (&config(""), [(admin, items, "400"), (admin, "/health", "200"), (admin, "/metrics", "200")].to_vec()),
    ] {
        let weir = Weir::new(text);
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        command
            .args(["run", "--role", "serve"])
            .current_dir(weir.0.path())
            .env_clear()
            .env("ONE_SECRET", "s3cr3t-0001");
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let since = Instant::now();
        while answer(admin, "/health").is_none() && since.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let found: Vec<_> =
            expected.iter().map(|(port, path, _)| answer(*port, path).map(|(status, _)| status)).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        let wanted: Vec<_> = expected.iter().map(|(.., status)| Some((*status).to_owned())).collect();
        assert_eq!(found, wanted, "{text}");
    }
    let nowhere = config("").replace(&format!("127.0.0.1:{admin}"), "off");
    Weir::new(&nowhere)
        .run(&["run", "--role", "serve"], &[("ONE_SECRET", "s3cr3t-0001")])
        .expect(64, &["items cannot be served"]);
}

//! What a compiler cannot say about the source: confined crates, stages that never meet, the order of folders.
//!
//! Each rule is a pure function over one file, so that its own test can show it a file that breaks it.

#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod dependencies;

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

/// A file with its path from the root of the repository, `/` as separator.
struct Source {
    path: String,
    text: String,
}

/// Line number from 1, and what is wrong there.
type Finding = (usize, String);

/// A rule: what is wrong with this file.
type Rule = fn(&Source) -> Vec<Finding>;

impl Source {
    fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    fn is_under(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path == *place || self.path.starts_with(&format!("{place}/")))
    }

    fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// Lines with their numbers, without comments.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate();
        lines.map(|(index, line)| (index + 1, without_comment(line))).filter(|(_, line)| !line.trim().is_empty())
    }

    /// The same without the tests, which stand at the end of a file or in one of their own.
    fn code_without_tests(&self) -> impl Iterator<Item = (usize, &str)> {
        let is_test = self.name() == "tests.rs" || self.path.contains("/tests/") || self.path.starts_with("tests/");
        self.code().take_while(move |(_, line)| !is_test && line.trim() != "#[cfg(test)]")
    }

    fn find(&self, forbidden: &str, why: &str) -> Vec<Finding> {
        let lines = self.code().filter(|(_, line)| mentions(line, forbidden));
        lines.map(|(number, _)| (number, format!("`{forbidden}`: {why}"))).collect()
    }
}

/// The line up to a comment. A `//` inside a URL stays, since no space precedes it.
fn without_comment(line: &str) -> &str {
    if line.trim_start().starts_with("//") {
        return "";
    }
    line.split(" // ").next().unwrap_or_default()
}

/// Whether a line has this text, not as the end of a longer word.
fn mentions(line: &str, text: &str) -> bool {
    line.match_indices(text).any(|(at, _)| {
        let before = line.get(..at).and_then(|before| before.chars().next_back());
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
    })
}

fn opens_with_a_sentence(source: &Source) -> Vec<Finding> {
    match source.text.lines().next() {
        Some(line) if line.starts_with("//! ") => Vec::new(),
        _ => vec![(1, "begin with `//! ` and one sentence that says what the file is for".to_owned())],
    }
}

/// Crates that only some places may use: crate path, those places, why. For reqwest also the tests in `src/`.
const CONFINED: &[(&str, &[&str], &str)] = &[
    (
        "rdkafka::",
        &["src/kafka", "tests/real", "tests/bench"],
        "Kafka is behind kafka::{Reader, Writer}, in src/kafka/",
    ),
    (
        "reqwest::",
        &[
            "src/platform/http.rs",
            "src/platform/route.rs",
            "src/batches/webhook.rs",
            "src/runtime/http_client.rs",
            "tests",
        ],
        "vendors are called through src/platform/http.rs alone",
    ),
    (
        "clickhouse::",
        &["src/store", "tests/real", "tests/bench/sink"],
        "ClickHouse is written and queried in src/store/ alone",
    ),
    (
        "redis::",
        &[
            "src/quota",
            "src/cache",
            "src/tokens",
            "src/runtime/redis_server.rs",
            "src/cli/check",
            "tests/real",
            "tests/bench",
        ],
        "Redis is behind the traits of src/quota/, src/cache/ and src/tokens/; src/cli/check asks only whether it is there",
    ),
];

fn confined_crates(source: &Source) -> Vec<Finding> {
    let mut found = Vec::new();
    for (name, places, why) in CONFINED {
        if source.is_under(places) {
            continue;
        }
        let lines: Vec<_> =
            if *name == "reqwest::" { source.code_without_tests().collect() } else { source.code().collect() };
        let lines = lines.into_iter().filter(|(_, line)| uses(line, name));
        found.extend(lines.map(|(number, _)| (number, format!("`{name}`: {why}"))));
    }
    found
}

/// Whether a line names the crate `name` (with `::`), not a module of ours with the same name.
fn uses(line: &str, name: &str) -> bool {
    let bare = name.trim_end_matches(':');
    let imported = [format!("use {bare};"), format!("use {bare} as "), format!("extern crate {bare}")];
    imported.iter().any(|import| line.trim_start().starts_with(import.as_str()))
        || line.match_indices(name).any(|(at, _)| {
            let before = line.get(..at).unwrap_or_default();
            // `::redis::` is the crate, `crate::redis::` is not.
            let before = before.strip_suffix("::").unwrap_or(before);
            !before.ends_with(|c: char| c.is_alphanumeric() || c == '_')
        })
}

const STAGES: [&str; 5] = ["enqueue", "fetch", "retry", "changes", "sink"];

fn stages_never_meet(source: &Source) -> Vec<Finding> {
    let Some(own) = STAGES.iter().find(|stage| source.is_under(&[&format!("src/{stage}"), &format!("src/{stage}.rs")]))
    else {
        return Vec::new();
    };
    let others = STAGES.iter().filter(|stage| *stage != own);
    let import = |stage: &&str| {
        let why = format!("stages meet on topics; src/{own}/ must not know the stage {stage}");
        [format!("crate::{stage}"), format!("super::super::{stage}")].map(|path| source.find(&path, &why)).concat()
    };
    let mut found: Vec<Finding> = others.clone().flat_map(import).collect();
    // `use crate::{fetch, …}`, also over several lines.
    let mut inside = false;
    for (number, line) in source.code() {
        inside |= line.contains("use crate::{");
        if inside && others.clone().any(|stage| names_item(line, stage)) {
            found.push((number, format!("stages meet on topics; src/{own}/ must not import another stage")));
        }
        inside &= !line.contains("};");
    }
    found
}

/// Whether a line of a `use crate::{…}` imports from this module at its outermost level, as far as a line shows.
fn names_item(line: &str, module: &str) -> bool {
    let line = line.trim().trim_start_matches("pub ").trim_start_matches("use crate::{");
    line.split(", ").any(|item| {
        let rest = item.trim().strip_prefix(module);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([':', ',', '}']))
    })
}

/// The folders and files of `src/`, the lowest first: each imports only from those before it, and none of two on one line
/// from the other.
const ORDER: &[&[&str]] = &[
    &["runtime"],
    &["breaker", "message"],
    &["topics"],
    &["kafka"],
    &["store", "timer", "cancelled", "quota", "cache"],
    &["platform"],
    &["tokens", "simulate"],
    &["enqueue", "fetch", "retry", "changes", "sink"],
    &["batches", "serve", "verify", "replay"],
    &["config"],
    &["run"],
    &["cli"],
    &["lib", "main"],
];

/// Where a module stands in [`ORDER`].
fn height(module: &str) -> Option<usize> {
    ORDER.iter().position(|level| level.contains(&module))
}

fn no_folder_imports_one_above_it(source: &Source) -> Vec<Finding> {
    let Some(own) = source.path.strip_prefix("src/").and_then(|path| path.split(['/', '.']).next()) else {
        return Vec::new();
    };
    // Tests may know everything.
    if source.name().ends_with("tests.rs") || source.path.contains("/tests/") {
        return Vec::new();
    }
    let Some(height_of_own) = height(own) else {
        return vec![(1, format!("`{own}` is not in the order of folders in tests/tidy.rs: say what it stands on"))];
    };
    let is_above = |module: &str| module != own && height(module).is_some_and(|height| height >= height_of_own);
    let found = modules_named(source).into_iter().filter(|(_, module)| is_above(module));
    found
        .map(|(line, module)| (line, format!("src/{own} must not import src/{module}, which does not stand below it")))
        .collect()
}

/// The modules of the crate that a file names, with the lines: of `crate::a::b` and `use crate::{a, b::{c, d}}` a and b.
fn modules_named(source: &Source) -> Vec<(usize, String)> {
    let (mut found, mut open, mut begins) = (Vec::new(), 0_usize, false);
    for (number, line) in without_tests(source) {
        let mut rest = line;
        while !rest.is_empty() {
            let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            let first = rest.chars().next().map_or(1, char::len_utf8);
            let (text, after) = rest.split_at(word.max(first));
            match text {
                "crate" if open == 0 && after.starts_with("::{") => (open, begins, rest) = (1, true, &after[3..]),
                "crate" if open == 0 && after.starts_with("::") => {
                    let end = after[2..].find(|c: char| !c.is_alphanumeric() && c != '_');
                    found.push((number, after[2..][..end.unwrap_or(after.len() - 2)].to_owned()));
                    rest = &after[2..];
                }
                _ if open > 0 && word > 0 => {
                    if begins && open == 1 {
                        found.push((number, text.to_owned()));
                    }
                    (begins, rest) = (false, after);
                }
                _ => {
                    match text {
                        "{" if open > 0 => open += 1,
                        "}" if open > 0 => open -= 1,
                        "," if open == 1 => begins = true,
                        _ => {}
                    }
                    rest = after;
                }
            }
        }
    }
    found
}

/// The lines without what is only there for tests: `#[cfg(test)]` and the item after it, and a module of tests at the end.
fn without_tests(source: &Source) -> Vec<(usize, &str)> {
    let (mut kept, mut lines) = (Vec::new(), source.code());
    while let Some((number, line)) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept.push((number, line));
            continue;
        }
        let Some((_, item)) = lines.next() else { break };
        if item.starts_with("mod ") && item.ends_with('{') {
            break;
        }
        // `mod a;`, `use a;`, or braces that end where they began.
        let indent = item.len() - item.trim_start().len();
        if !item.trim_end().ends_with([';', ',']) {
            lines
                .find(|(_, line)| line.len() - line.trim_start().len() == indent && line.trim_start().starts_with('}'));
        }
    }
    kept
}

fn names_that_say_nothing(source: &Source) -> Vec<Finding> {
    let empty = ["utils", "util", "common", "types", "core", "helpers", "misc"];
    let bad = source.path.split('/').find(|part| empty.contains(&part.trim_end_matches(".rs")));
    bad.map(|part| (1, format!("`{part}` says nothing: name the file after what it is about"))).into_iter().collect()
}

fn topic_names_in_one_place(source: &Source) -> Vec<Finding> {
    if source.is_under(&["src/topics.rs"]) {
        return Vec::new();
    }
    let literal = |line: &str| {
        let whole =
            ["\"weir.requests", "\"weir.results", "\"weir.failures", "\"weir.dead\"", "\"weir.dead.", "\"weir.quota\""];
        let parts = ["}.requests.", "}.results\"", "}.failures\"", "}.dead\"", "}.quota\""];
        whole.iter().chain(&parts).any(|part| line.contains(part))
    };
    let lines = source.code_without_tests().filter(|(_, line)| literal(line));
    lines
        .map(|(number, _)| (number, "topic names come from topics::Topics: the prefix is a setting".to_owned()))
        .collect()
}

fn nothing_unfinished(source: &Source) -> Vec<Finding> {
    let marks = [("todo!", "finish it, or return an error"), ("unimplemented!", "finish it"), ("dbg!", "use tracing")];
    marks.iter().flat_map(|(mark, why)| source.find(mark, why)).collect()
}

/// Modules that are a file beside the folder of their parts: each is `x.rs` alone, or `x/mod.rs` with its parts.
fn files_beside_their_folder<'a>(paths: &[&'a str]) -> Vec<&'a str> {
    let has_folder = |path: &&str| {
        let folder = path.strip_suffix(".rs").map(|module| format!("{module}/"));
        folder.is_some_and(|folder| paths.iter().any(|other| other.starts_with(&folder)))
    };
    paths.iter().copied().filter(has_folder).collect()
}

/// All `.rs` files under a folder of the repository, by path.
fn files(folder: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut folders, mut found) = (vec![root.join(folder)], Vec::<PathBuf>::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the repository can be read") {
            let path = entry.expect("the repository can be read").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    let source = |path: &PathBuf| Source {
        path: path.strip_prefix(root).expect("found below").to_string_lossy().replace('\\', "/"),
        text: fs::read_to_string(path).expect("source is UTF-8"),
    };
    found.iter().map(source).collect()
}

/// Fails with every line of these folders that breaks the rule.
fn enforce(rule: Rule, folders: &[&str]) {
    let mut report = String::new();
    let sources: Vec<Source> = folders.iter().flat_map(|folder| files(folder)).collect();
    assert!(sources.len() > 5, "found hardly any source: is this the right place?");
    // This file names what it forbids.
    for source in sources.iter().filter(|source| source.path != "tests/tidy.rs") {
        for (line, what) in rule(source) {
            writeln!(report, "{}:{line}: {what}", source.path).expect("a string takes all text");
        }
    }
    assert!(report.is_empty(), "\n{report}");
}

#[test]
fn every_file_opens_with_a_sentence() {
    enforce(opens_with_a_sentence, &["src", "tests"]);
}

#[test]
fn the_outside_world_is_confined() {
    enforce(confined_crates, &["src", "tests"]);
}

#[test]
fn stages_never_import_each_other() {
    enforce(stages_never_meet, &["src"]);
}

#[test]
fn folders_import_only_what_stands_below_them() {
    enforce(no_folder_imports_one_above_it, &["src"]);
}

#[test]
fn a_module_is_laid_out_in_one_way() {
    let sources = files("src");
    let paths: Vec<&str> = sources.iter().map(|source| source.path.as_str()).collect();
    assert!(paths.len() > 5);
    assert_eq!(files_beside_their_folder(&paths), Vec::<&str>::new(), "move x.rs to x/mod.rs");
    assert_eq!(files_beside_their_folder(&["src/a.rs", "src/a/b.rs", "src/ab.rs", "src/c/mod.rs"]), ["src/a.rs"]);
}

#[test]
fn no_file_has_a_name_that_says_nothing() {
    enforce(names_that_say_nothing, &["src", "tests"]);
}

#[test]
fn topics_are_named_in_one_place() {
    enforce(topic_names_in_one_place, &["src"]);
}

#[test]
fn nothing_is_left_unfinished() {
    enforce(nothing_unfinished, &["src", "tests"]);
}

#[test]
fn each_rule_finds_what_it_forbids_and_nothing_else() {
    let bad: &[(Rule, &str, &str)] = &[
        (opens_with_a_sentence, "src/a.rs", "use std::fs;\n//! Late.\n"),
        (opens_with_a_sentence, "src/a.rs", ""),
        (confined_crates, "src/fetch/mod.rs", "use rdkafka::message::Message;"),
        (confined_crates, "src/fetch/mod.rs", "fn a(x: &::rdkafka::Message) {}"),
        (confined_crates, "src/platform/ali1688/mod.rs", "    let client = reqwest::Client::new();"),
        (confined_crates, "src/cli/query.rs", "use clickhouse::Client;"),
        (confined_crates, "src/quotation.rs", "use redis::aio::ConnectionManager;"),
        (confined_crates, "src/fetch/mod.rs", "use redis;"),
        (stages_never_meet, "src/retry/mod.rs", "use crate::fetch::Config;"),
        (stages_never_meet, "src/sink/block.rs", "use crate::{\n    message::Class,\n    retry::policy,\n};"),
        (stages_never_meet, "src/sink/block.rs", "use crate::{fetch, message::Class};"),
        (no_folder_imports_one_above_it, "src/quota/limit.rs", "use crate::config::duration_text;"),
        (
            no_folder_imports_one_above_it,
            "src/runtime/metrics.rs",
            "use crate::{\n    message::{Lane, codec::{a, b}},\n};",
        ),
        (no_folder_imports_one_above_it, "src/store/row.rs", "use crate::{message::Class, quota, topics::Topic};"),
        (no_folder_imports_one_above_it, "src/breaker.rs", "fn a(x: crate::message::Class) {}"),
        (no_folder_imports_one_above_it, "src/kafka/mod.rs", "#[cfg(test)]\nmod scripted;\nuse crate::store::Store;"),
        (
            no_folder_imports_one_above_it,
            "src/kafka/a.rs",
            "#[cfg(test)]\nfn a() {\n    b();\n}\nuse crate::cli::exit;",
        ),
        (no_folder_imports_one_above_it, "src/elsewhere/mod.rs", "//! Nobody knows what it stands on."),
        (names_that_say_nothing, "src/utils.rs", "//! Things."),
        (names_that_say_nothing, "src/common/mod.rs", "//! Things."),
        (topic_names_in_one_place, "src/sink/mod.rs", "let topic = \"weir.results\";"),
        (topic_names_in_one_place, "src/sink/mod.rs", "let topic = format!(\"{prefix}.requests.{source}\");"),
        (nothing_unfinished, "src/a.rs", "fn a() { todo!() }"),
        (nothing_unfinished, "tests/a.rs", "    dbg!(1);"),
    ];
    for (rule, path, text) in bad {
        assert_eq!(rule(&Source::new(path, text)).len(), 1, "{path}: {text:?} must be found once");
    }
    let good: &[(Rule, &str, &str)] = &[
        (opens_with_a_sentence, "src/a.rs", "//! Sentence.\n"),
        (confined_crates, "src/kafka/reader.rs", "use rdkafka::message::Message;"),
        (confined_crates, "src/platform/http.rs", "use reqwest::Client;"),
        (confined_crates, "src/simulate/tests.rs", "use reqwest::Client;"),
        (confined_crates, "src/simulate/mod.rs", "#[cfg(test)]\nuse reqwest::Client;"),
        (
            confined_crates,
            "src/lib.rs",
            "// rdkafka::Message is confined.\n/// redis::Client too\nuse crate::redis::X;",
        ),
        (stages_never_meet, "src/cli/run.rs", "use crate::{fetch, retry};"),
        (
            stages_never_meet,
            "src/retry/mod.rs",
            "use crate::{\n    message::Class,\n    runtime::{fetching, sinks},\n};",
        ),
        (stages_never_meet, "src/fetch/mod.rs", "use crate::fetch::window::Window;"),
        (no_folder_imports_one_above_it, "src/cli/run.rs", "use crate::{config::Config, run::{self, Role}};"),
        (no_folder_imports_one_above_it, "src/store/row.rs", "use crate::store::Route;\n// use crate::cli;"),
        (
            no_folder_imports_one_above_it,
            "src/kafka/logs.rs",
            "use crate::{message::{cli, run}, topics::Topics};\n#[cfg(test)]\nuse crate::cli;\n#[cfg(test)]\nmod tests {\n    use crate::fetch::Fetch;\n}",
        ),
        (no_folder_imports_one_above_it, "src/quota/journal/tests.rs", "use crate::simulate::Simulator;"),
        (names_that_say_nothing, "src/quota/memory.rs", ""),
        (
            topic_names_in_one_place,
            "src/cli/mod.rs",
            "/// kcat -t \"weir.requests.ali1688\"\nlet s = \"to weir.dead\";",
        ),
        (
            topic_names_in_one_place,
            "src/a.rs",
            "const A: &str = \"weir.dead_letter.v1\";\n#[cfg(test)]\nlet t = \"weir.dead\";",
        ),
        (nothing_unfinished, "src/a.rs", "// todo! is forbidden\nmy_todo!();"),
    ];
    for (rule, path, text) in good {
        assert_eq!(rule(&Source::new(path, text)), Vec::new(), "{path}: {text:?} is fine");
    }
}

//! What holds for the libraries: each may be used, comes from the registry, has a reason and a use, and is there once.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use serde::Deserialize;
use spdx::{Expression, ParseMode};

/// Licences under which a library may be part of a program under Apache-2.0.
const LICENCES: &[&str] =
    &["Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "ISC", "MIT", "MIT-0", "Unicode-3.0", "Zlib"];

/// Libraries that weir names, and of which others still need another version: base64 by sfv, rand by clickhouse.
const TWICE: &[&str] = &["base64", "rand"];

/// The part of `cargo metadata` that is read.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

/// Every library of weir and its tests on Linux.
fn libraries() -> Vec<Package> {
    let arguments = ["metadata", "--format-version", "1", "--locked", "--filter-platform", "x86_64-unknown-linux-gnu"];
    let output = Command::new(env!("CARGO")).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let output = output.expect("cargo can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Metadata = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    metadata.packages.into_iter().filter(|package| package.name != env!("CARGO_PKG_NAME")).collect()
}

/// Whether a licence expression, as it stands in a Cargo.toml, can be met by [`LICENCES`].
fn is_allowed(licence: &str) -> bool {
    let Ok(expression) = Expression::parse_mode(licence, ParseMode::LAX) else { return false };
    expression.evaluate(|asked| {
        let id = asked.license.id();
        asked.addition.is_none() && id.is_some_and(|id| LICENCES.contains(&id.name))
    })
}

/// A library that Cargo.toml names, and whether a comment stands directly above it.
fn named(manifest: &str) -> Vec<(&str, bool)> {
    let (mut found, mut before, mut is_list) = (Vec::new(), "", false);
    for line in manifest.lines() {
        if line.starts_with('[') {
            is_list = line.ends_with("dependencies]");
        } else if let Some((name, _)) = line.split_once(" = ")
            && is_list
            && !line.starts_with('#')
        {
            found.push((name, before.starts_with("# ")));
        }
        before = line;
    }
    found
}

fn manifest() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    fs::read_to_string(path).expect("the manifest can be read")
}

#[test]
fn every_library_may_be_used_and_comes_from_the_registry() {
    let libraries = libraries();
    assert!(libraries.len() > 100, "found hardly any library: is this the right place?");
    for Package { name, version, license, source } in libraries {
        let is_from_registry = source.as_deref().is_some_and(|source| source.starts_with("registry+"));
        assert!(is_from_registry, "{name} {version} comes from {source:?}");
        let license = license.unwrap_or_default();
        assert!(is_allowed(&license), "{name} {version} is under {license:?}, of which nothing is in LICENCES");
    }
}

#[test]
fn of_each_library_that_is_named_there_is_one_version() {
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for Package { name, version, .. } in libraries() {
        versions.entry(name).or_default().insert(version);
    }
    let manifest = manifest();
    let twice: BTreeSet<&str> =
        named(&manifest).into_iter().map(|(name, _)| name).filter(|name| versions[*name].len() > 1).collect();
    assert_eq!(twice, TWICE.iter().copied().collect(), "{versions:#?}");
}

#[test]
fn every_library_has_its_reason_beside_it() {
    let manifest = manifest();
    let silent: Vec<_> = named(&manifest).into_iter().filter(|(_, is_told)| !is_told).collect();
    assert!(named(&manifest).len() > 40 && silent.is_empty(), "write in Cargo.toml what these are for: {silent:?}");
}

#[test]
fn every_library_is_used() {
    let sources: String =
        ["src", "tests"].iter().flat_map(|folder| super::files(folder)).map(|file| file.text).collect();
    let manifest = manifest();
    let is_used = |name: &str| {
        // The one whose library has another name.
        let path = if name == "md-5" { "md5".to_owned() } else { name.replace('-', "_") };
        ["::", "!", ";"].iter().any(|end| super::mentions(&sources, &format!("{path}{end}")))
            // As in `#[serde(with = "humantime_serde")]`.
            || sources.contains(&format!("with = \"{path}\""))
    };
    let unused: Vec<_> = named(&manifest).into_iter().map(|(name, _)| name).filter(|name| !is_used(name)).collect();
    assert!(unused.is_empty(), "nothing in src or tests names {unused:?}: take it out of Cargo.toml");
}

#[test]
fn a_licence_is_judged_as_it_is_written() {
    for good in
        ["MIT", "MIT/Apache-2.0", "GPL-2.0-only OR MIT", "(MIT OR Apache-2.0) AND Unicode-3.0", "Apache-2.0 / MIT"]
    {
        assert!(is_allowed(good), "{good}");
    }
    for bad in ["", "GPL-3.0-only", "MIT AND MPL-2.0", "LicenseRef-ours", "Apache-2.0 WITH LLVM-exception"] {
        assert!(!is_allowed(bad), "{bad}");
    }
}

#[test]
fn a_library_is_found_with_the_comment_above_it() {
    let text = "[package]\nname = \"x\"\n[dependencies]\n# Why.\na = \"1\"\nb-c = { version = \"1\" }\n\n[[test]]\nname = \"t\"\n";
    assert_eq!(named(text), [("a", true), ("b-c", false)]);
}

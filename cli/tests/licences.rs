//! Every crate that is built for this platform has a licence that `deny.toml` allows, and none is a crate it denies.
//!
//! Not here: advisories and sources, for which there is `cargo deny check`.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeSet;
use std::env::consts::ARCH;
use std::path::Path;

use cargo_metadata::{MetadataCommand, Package};
use serde::Deserialize;

#[derive(Deserialize)]
struct Rules {
    licenses: Licences,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licences {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Banned>,
}

#[derive(Deserialize)]
struct Banned {
    name: String,
}

fn rules() -> Rules {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deny.toml");
    toml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Crates of this platform: those of others may never have been downloaded.
fn packages() -> Vec<Package> {
    let options = ["--locked", "--filter-platform", &format!("{ARCH}-unknown-linux-gnu")];
    let metadata = MetadataCommand::new()
        .manifest_path(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .other_options(options.map(str::to_owned))
        .exec()
        .unwrap();
    metadata.packages
}

/// An SPDX expression, `OR` binding loosest, under a list of allowed terms. `/` is the old way to write `OR`.
struct Expression<'a> {
    tokens: Vec<String>,
    at: usize,
    allowed: &'a BTreeSet<String>,
}

impl<'a> Expression<'a> {
    fn is_allowed(text: &str, allowed: &'a BTreeSet<String>) -> bool {
        let spaced = text.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
        let tokens = spaced.split_whitespace().map(str::to_owned).collect();
        let mut expression = Self { tokens, at: 0, allowed };
        expression.any() && expression.at == expression.tokens.len()
    }

    fn take(&mut self, word: &str) -> bool {
        let found = self.tokens.get(self.at).is_some_and(|token| token == word);
        self.at += usize::from(found);
        found
    }

    fn any(&mut self) -> bool {
        let mut good = self.all();
        while self.take("OR") {
            good |= self.all();
        }
        good
    }

    fn all(&mut self) -> bool {
        let mut good = self.term();
        while self.take("AND") {
            good &= self.term();
        }
        good
    }

    fn term(&mut self) -> bool {
        if self.take("(") {
            let good = self.any();
            return self.take(")") && good;
        }
        let mut term = self.tokens.get(self.at).cloned().unwrap_or_default();
        self.at += 1;
        if self.take("WITH") {
            term = format!("{term} WITH {}", self.tokens.get(self.at).map_or("", String::as_str));
            self.at += 1;
        }
        self.allowed.contains(&term)
    }
}

#[test]
fn every_dependency_has_a_licence_that_is_allowed() {
    let (rules, packages) = (rules(), packages());
    assert!(packages.len() > 100, "only {} packages were found", packages.len());
    let refused = |package: &&Package| {
        let licence = package.license.as_deref().unwrap_or("");
        !Expression::is_allowed(licence, &rules.licenses.allow)
    };
    let refused: Vec<String> = packages
        .iter()
        .filter(refused)
        .map(|package| format!("{} {}: {:?}", package.name, package.version, package.license))
        .collect();
    assert!(refused.is_empty(), "not allowed by deny.toml: {refused:#?}");
}

#[test]
fn no_dependency_is_a_crate_that_is_denied() {
    let (rules, packages) = (rules(), packages());
    let denied = |name: &str| rules.bans.deny.iter().any(|banned| banned.name == name);
    let found: Vec<&str> =
        packages.iter().map(|package| package.name.as_str()).filter(|n| denied(n)).collect();
    assert!(found.is_empty(), "denied by deny.toml: {found:?}");
}

#[test]
fn licence_expressions_are_read_as_spdx_has_them() {
    let allowed: BTreeSet<String> =
        ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned).into();
    for (text, expect) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("", false),
        ("MIT OR GPL-3.0", true),
        ("GPL-3.0/MIT", true),
        ("MIT AND GPL-3.0", false),
        ("GPL-3.0 OR MIT AND ISC", true),
        ("(GPL-3.0 OR MIT) AND ISC", true),
        ("(MIT OR ISC) AND GPL-3.0", false),
        ("Apache-2.0 WITH LLVM-exception", true),
        ("Apache-2.0", false),
        ("MIT )", false),
        ("MIT ISC", false),
    ] {
        assert_eq!(Expression::is_allowed(text, &allowed), expect, "{text}");
    }
}

//! `docs/hostile.md` names tests that exist, and all of these.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The names of the tests in a file.
fn tests_in(file: &Path) -> Vec<String> {
    let text =
        fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let mut after_attribute = false;
    let mut names = Vec::new();
    for line in text.lines().map(str::trim) {
        if line == "#[test]" {
            after_attribute = true;
        } else if let Some(rest) = line.strip_prefix("fn ").filter(|_| after_attribute) {
            names.push(rest.split('(').next().unwrap().to_owned());
            after_attribute = false;
        }
    }
    names
}

#[test]
fn the_published_table_has_every_attack_and_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = fs::read_to_string(root.join("docs/hostile.md")).unwrap();
    let mut attacks = BTreeSet::new();
    let mut named = BTreeSet::new();
    // | H1 | what | `file`: `test`, `test`; `file`: `test` | outcome |
    for row in text.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [attack, _, tests, outcome] = cells[..] else {
            panic!("not four cells: {row}")
        };
        assert!(!outcome.is_empty(), "{row}");
        attacks.insert(attack.to_owned());
        for group in tests.split("; ") {
            let (file, names) = group.split_once(": ").unwrap_or_else(|| panic!("{group}"));
            let file = root.join(file.trim_matches('`'));
            let there = tests_in(&file);
            for name in names.split(", ").map(|name| name.trim_matches('`')) {
                assert!(
                    there.contains(&name.to_owned()),
                    "no `{name}` in {}",
                    file.display()
                );
                named.insert(name.to_owned());
            }
        }
    }
    let hostile = (1..=12).map(|n| format!("H{n}"));
    let expected: Vec<_> = hostile.chain((1..=8).map(|n| format!("S{n}"))).collect();
    let missing: Vec<_> = expected
        .iter()
        .filter(|&attack| !attacks.contains(attack))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");

    let own = fs::read_dir(root.join("tests/hostile")).unwrap();
    for file in own.map(|entry| entry.unwrap().path()) {
        for name in tests_in(&file)
            .iter()
            .filter(|_| !file.ends_with("table.rs"))
        {
            assert!(named.contains(name), "`{name}` is not in the table");
        }
    }
}

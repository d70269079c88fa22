//! Whoever looks for a parameter finds it, and its default, wherever they look: in
//! `nbdkit --help`, the manual page and README.md, and a program by `--dump-plugin`. And
//! what docs/reliability.md promises has its tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use nbdkit_cow_filter::filter::config::{PARAMETERS, Parameter};

use crate::harness::Setup;
use crate::harness::command::{command, success};

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What is from one line to the next that starts with `end`.
fn section<'a>(text: &'a str, heading: &str, end: &str) -> &'a str {
    let (_, rest) = text
        .split_once(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("no line {heading:?}"));
    rest.split(&format!("\n{end}")).next().unwrap_or(rest)
}

/// The entries of a text, of which each begins with `start` and a parameter's key, as
/// that key and the words that follow it.
fn entries(text: &str, start: &str) -> Vec<(String, String)> {
    format!("\n{text}")
        .split(&format!("\n{start}cow-"))
        .skip(1)
        .map(|entry| {
            let (name, text) = entry
                .split_once(['=', '`'])
                .unwrap_or_else(|| panic!("neither = nor ` in {entry}"));
            let words: Vec<_> = text.split_whitespace().collect();
            (format!("cow-{name}"), words.join(" "))
        })
        .collect()
}

/// Checks that the entries are about all parameters and no others, and that an entry of
/// each that has a default says so, in the words that `says` makes of it.
fn assert_complete(place: &str, entries: &[(String, String)], says: fn(&str) -> String) {
    for (key, _) in entries {
        let known = PARAMETERS.iter().any(|parameter| parameter.key == key);
        assert!(known, "{place} has {key}, which the filter does not take");
    }
    for Parameter { key, default, .. } in PARAMETERS {
        let mut texts = entries
            .iter()
            .filter(|(name, _)| name == key)
            .map(|(_, text)| text)
            .peekable();
        assert!(texts.peek().is_some(), "{key} is missing in {place}");
        if let Some(default) = default {
            let words = says(default);
            assert!(
                texts.any(|text| text.contains(&words)),
                "{place} does not say of {key}: {words}"
            );
        }
    }
}

#[test]
fn help_has_every_parameter() {
    let help = Setup::new().option("--help").output(&["null"]);
    assert!(help.status.success(), "{}", help.stderr);
    assert_complete("nbdkit --help", &entries(&help.stdout, ""), |default| {
        format!("(default: {default})")
    });
}

#[test]
fn the_manual_page_has_every_parameter() {
    let manual = file("docs/nbdkit-cow-filter.pod");
    let synopsis = section(&manual, "=head1 SYNOPSIS", "=head1 ");
    let synopsis = synopsis.replace('[', "\n[");
    assert_complete("SYNOPSIS", &entries(&synopsis, "["), |_| String::new());
    let parameters = entries(&manual, "=item B<");
    assert_complete("the manual page", &parameters, |_| String::new());
    for Parameter { key, default, .. } in PARAMETERS {
        let Some(default) = default else { continue };
        let is_said = parameters.iter().any(|(name, text)| {
            name == key
                && text.starts_with(&format!("{default}> "))
                && text.contains("This is the default.")
        });
        assert!(
            is_said,
            "the manual page does not say of {key}={default} that it is the default"
        );
    }
}

#[test]
fn readme_has_every_parameter() {
    let readme = file("README.md");
    let table = section(&readme, "## Parameters", "## ");
    assert_complete("README.md", &entries(table, "| `"), |default| {
        format!("| `{default}` |")
    });
}

/// Where nbdkit's header has the callback for it.
#[cfg(nbdkit_dump_plugin)]
#[test]
fn dump_plugin_has_every_parameter() {
    let dump = Setup::new().option("--dump-plugin").output(&["null"]);
    assert!(dump.status.success(), "{}", dump.stderr);
    let said = |key: &str| {
        let mut lines = dump.stdout.lines();
        let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("{key} in {}", dump.stdout))
    };
    assert_eq!(
        said("cow_parameters"),
        PARAMETERS.map(|parameter| parameter.key).join(",")
    );
    let manual = file("docs/nbdkit-cow-filter.pod");
    let probing = section(&manual, "=head2 Probing", "=head");
    let ours = dump.stdout.lines().filter(|line| line.starts_with("cow_"));
    for line in ours {
        let (key, _) = line.split_once('=').expect("key=value");
        let item = format!("=item C<{key}>\n");
        assert!(
            probing.contains(&item),
            "{key} is missing in the manual page"
        );
    }
}

/// The cells of the one table of a page.
fn table<const COLUMNS: usize>(page: &str) -> Vec<[&str; COLUMNS]> {
    let lines = page.lines().filter(|line| line.starts_with('|'));
    lines
        .map(|line| {
            let cells = line.trim_matches('|').split('|').map(str::trim);
            let cells: Vec<_> = cells.collect();
            assert!(!cells.contains(&""), "an empty cell in {line}");
            let columns = cells.len();
            cells
                .try_into()
                .unwrap_or_else(|_| panic!("{columns} columns: {line}"))
        })
        .collect()
}

/// The tests of this executable, also the ignored ones.
fn own_tests() -> BTreeSet<String> {
    let own = std::env::current_exe().expect("the path of this executable");
    let list = success(command(own).arg("--list"));
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    names.map(str::to_string).collect()
}

/// Whether a file of a module, or of what is at the top of `directory`, has this test.
fn is_in_source(directory: &str, test: &str) -> bool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let mut path: Vec<_> = test.split("::").collect();
    let name = path.pop().expect("split gives one word at least");
    let places: [PathBuf; 2] = if path.is_empty() {
        [root.join("main.rs"), root.join("lib.rs")]
    } else {
        // Unit tests are in their module's file.
        path.retain(|module| *module != "tests");
        let module = path.iter().fold(root, |path, module| path.join(module));
        [module.with_extension("rs"), module.join("mod.rs")]
    };
    let sources = places
        .iter()
        .filter_map(|place| fs::read_to_string(place).ok());
    let start = format!("fn {name}(");
    sources.into_iter().any(|source| {
        let mut attributes = Vec::new();
        source.lines().map(str::trim).any(|line| {
            let is_it = line.starts_with(&start) && attributes.contains(&"#[test]");
            match line.starts_with("#[") {
                true => attributes.push(line),
                false => attributes.clear(),
            }
            is_it
        })
    })
}

fn exists(test: &str, own_tests: &BTreeSet<String>) -> bool {
    let (kind, name) = test
        .split_once(' ')
        .unwrap_or_else(|| panic!("a kind and a name, not {test:?}"));
    match kind {
        "nbdkit" => own_tests.contains(name),
        "core" | "loom" | "memory" => is_in_source(&format!("tests/{kind}"), name),
        "lib" => is_in_source("src", name),
        "make" => file("Makefile").contains(&format!("\n{name}:\n")),
        kind => panic!("{kind:?} is no kind of test"),
    }
}

#[test]
fn the_table_of_promises_is_that_of_the_tests() {
    let page = file("docs/reliability.md");
    let rows = table::<4>(&page);
    let head = ["fault", "how it is injected", "what is promised", "test"];
    assert_eq!(rows[..2], [head, ["---"; 4]]);
    let own_tests = own_tests();
    let mut named = BTreeSet::new();
    for [fault, _, _, tests] in &rows[2..] {
        for test in tests.split(", ") {
            let test = test
                .strip_prefix('`')
                .and_then(|test| test.strip_suffix('`'))
                .unwrap_or_else(|| panic!("{fault}: a name in backticks, not {test}"));
            assert!(exists(test, &own_tests), "{fault}: there is no test {test}");
            named.insert(test);
        }
    }
    // Those of its own parts promise nothing.
    let promises =
        |test: &&String| test.starts_with("reliability::") && !test.contains("::tests::");
    for test in own_tests.iter().filter(promises) {
        let name = format!("nbdkit {test}");
        assert!(
            named.contains(name.as_str()),
            "{test} is missing in the table of docs/reliability.md"
        );
    }
}

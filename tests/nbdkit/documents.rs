//! Whoever looks for a parameter finds it, and its default, wherever they look: in
//! `nbdkit --help`, the manual page and README.md, and a program by `--dump-plugin`.

use std::fs;
use std::path::Path;

use nbdkit_cow_filter::filter::config::{PARAMETERS, Parameter};

use crate::harness::Setup;

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

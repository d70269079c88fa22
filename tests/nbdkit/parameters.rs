//! Parameters: what is accepted, what is refused and with which words.

use crate::harness::command::{Outcome, command, outcome};
use crate::harness::setup::library;
use crate::harness::{Base, Server, Setup, noise, run};

/// A bad value ends nbdkit with one message that names the parameter, the value
/// and each of the words that tell what is allowed.
fn assert_refused(key: &str, value: &str, allowed: &[&str]) {
    let parameter = format!("{key}={value}");
    let error = Setup::new().error(&["null", "size=1M", &parameter]);
    for word in [&[key, value], allowed].concat() {
        assert!(
            error.contains(word),
            "{word:?} in the message for {parameter}: {error}"
        );
    }
}

#[test]
fn a_block_size_out_of_range_or_no_power_of_two_is_refused() {
    for value in [
        "0", "1", "256", "3000", "513", "4G", "-1", "abc", "", "4K4", "1e9",
    ] {
        assert_refused("cow-block-size", value, &["power of two", "512", "2G"]);
    }
}

#[test]
fn a_limit_that_is_no_size_or_too_small_for_anything_is_refused() {
    for value in ["0", "-1", "", "10%", "0G", "1GB"] {
        assert_refused("cow-limit", value, &["size in bytes", "more than 0"]);
    }
    for (limit, block) in [("4096", "4096"), ("64K", "65536")] {
        let parameters = [
            format!("cow-limit={limit}"),
            format!("cow-block-size={block}"),
        ];
        let plugin = ["null", "size=1M", &parameters[0], &parameters[1]];
        let error = Setup::new().error(&plugin);
        for word in ["cow-limit=", "is too small", block] {
            assert!(error.contains(word), "{word} in {error}");
        }
        let base = Base::new(&noise(1, 10_000));
        let overlay = format!("cow-overlay={}/diff", base.directory().display());
        let plugin = [
            "file",
            base.path(),
            &overlay,
            &parameters[0],
            &parameters[1],
        ];
        let error = Setup::new().error(&plugin);
        assert!(error.contains("is too small"), "{error}");
    }
    // An image has a table as well.
    let base = Base::new(&noise(1, 10_000));
    let overlay = format!("cow-overlay={}/diff", base.directory().display());
    let needed = (16 << 10) + 4096 + 520 + 1152;
    let mut plugin = ["file", base.path(), &overlay, "cow-block-size=4K", ""];
    let limits = [needed - 1, needed].map(|limit| format!("cow-limit={limit}"));
    plugin[4] = &limits[0];
    let error = Setup::new().error(&plugin);
    assert!(error.contains(&format!("takes {needed} bytes")), "{error}");
    plugin[4] = &limits[1];
    let server = Setup::new().start(&plugin);
    server.nbdsh("h.pwrite(b'x', 0)");
    server.stop();
}

#[test]
fn a_relative_path_for_cow_on_read_is_refused() {
    for value in ["relative/path", "maybe", "./here", ""] {
        assert_refused("cow-on-read", value, &["true", "false", "absolute path"]);
    }
}

#[test]
fn a_value_that_is_no_boolean_is_refused() {
    for value in ["2x", "maybe", "", "/tmp/file"] {
        assert_refused("cow-on-cache", value, &["true", "false"]);
    }
    for value in ["perhaps", "2", ""] {
        assert_refused("cow-serialize", value, &["true", "false"]);
    }
}

#[test]
fn an_unknown_scope_is_refused() {
    for value in ["disk", "Export", "connections", ""] {
        assert_refused("cow-scope", value, &["export", "connection"]);
    }
}

/// The same spellings as in all of nbdkit.
#[test]
fn booleans_are_read_as_nbdkit_reads_them() {
    for value in ["true", "TRUE", "yes", "on", "1", "false", "no", "off", "0"] {
        for key in ["cow-on-read", "cow-on-cache", "cow-serialize"] {
            Server::start(&["null", "size=1M", &format!("{key}={value}")]).stop();
        }
    }
}

/// nbdkit itself and the filter have taken this value, or both have refused it.
#[track_caller]
fn assert_both_or_none(value: &str, theirs: &Outcome, ours: &Outcome) {
    assert_eq!(
        theirs.status.success(),
        ours.status.success(),
        "{value:?}: {} {}",
        theirs.stderr,
        ours.stderr
    );
}

/// The largest number that nbdkit takes for a size is the largest limit too.
#[test]
fn limits_end_where_sizes_end_in_nbdkit() {
    for value in [
        "7E",
        "9223372036854775807",
        "9223372036854775808",
        "8E",
        "15E",
        "18446744073709551615",
    ] {
        let mut theirs = command("nbdkit");
        theirs.args(["-U", "-", "null", &format!("size={value}"), "--run", "true"]);
        let theirs = outcome(&mut theirs);
        let parameter = format!("cow-limit={value}");
        let ours = Setup::new().run(&["null", "size=1M", &parameter], "true");
        assert_both_or_none(value, &theirs, &ours);
    }
}

/// Asked of a plugin that has nbdkit read its size. (Not of numbers that begin with a zero:
/// nbdkit 1.48 takes them for octal and hexadecimal ones.)
#[test]
fn sizes_are_read_as_nbdkit_reads_them() {
    for value in [
        "8192",
        "8k",
        "8K",
        "8192b",
        "8192B",
        "16s",
        "16S",
        "2m",
        "2M",
        " 8192",
        "\t\n\x0b\x0c\r8192",
        "+8192",
        " +8K",
        "",
        " ",
        "k",
        "+",
        "++8192",
        "+ 8192",
        "-8192",
        "--8192",
        "8192 ",
        "8192\n",
        "8kb",
        "8kk",
        "8 k",
        "8ki",
        "1e4",
        "8.0k",
        "8,192",
        "\u{a0}8192",
        "8192\u{e9}",
        "16E",
        "9999E",
        "18446744073709560000",
        "99999999999999999999",
    ] {
        let mut theirs = command("nbdkit");
        theirs.args(["-U", "-", "memory", &format!("size={value}")]);
        let theirs = outcome(theirs.args(["--run", "nbdinfo --size \"$uri\""]));
        let parameter = format!("cow-block-size={value}");
        let ours = Setup::new().run(&["null", "size=1M", &parameter], "nbdinfo \"$uri\"");
        assert_both_or_none(value, &theirs, &ours);
        if theirs.status.success() {
            // Newer versions say it once more, with a unit.
            let ours = ours.stdout.lines().find_map(|line| {
                let words = line.trim().strip_prefix("block_size_preferred: ")?;
                words.split_whitespace().next()
            });
            assert_eq!(ours, Some(theirs.stdout.trim()), "{value:?}");
        }
    }
    for value in ["2G", "1g", "512", "1073741824"] {
        Server::start(&["null", "size=1M", &format!("cow-block-size={value}")]).stop();
    }
}

#[test]
fn a_parameter_that_is_not_ours_reaches_the_plugin() {
    let error = Setup::new().error(&["null", "size=1M", "cow-nonsense=1"]);
    assert!(error.contains("cow-nonsense"), "{error}");
    let base = Base::new(&noise(1, 10_000));
    let server = Setup::new().below("offset").start(&[
        "file",
        "fadvise=sequential",
        &format!("file={}", base.path()),
        "cow-block-size=8K",
        "offset=1000",
        "range=5000",
    ]);
    server.nbdsh_with(
        &[base.path()],
        "same(read(h), open(ARGS[0], 'rb').read()[1000:6000])",
    );
}

#[test]
fn the_library_exports_two_symbols() {
    let said = run(&["nm", "-D", "--defined-only", library()]);
    let mut symbols: Vec<_> = said
        .lines()
        .map(|line| line.split_whitespace().last().unwrap_or(line))
        .collect();
    symbols.sort_unstable();
    assert_eq!(symbols, ["cow_debug_verbose", "filter_init"]);
}

#[test]
fn nbdkit_knows_the_filter_by_its_name() {
    let dump = Setup::new().option("--dump-plugin").output(&["null"]);
    assert!(dump.status.success(), "{}", dump.stderr);
    let help = Setup::new().option("--help").output(&["null"]);
    assert!(help.stdout.contains("filter: cow"), "{}", help.stdout);
}

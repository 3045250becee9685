//! The house stays as it was drawn: imports run one way, the clock is read in one place, and one file or room names each
//! foreign crate.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// One source file without its comments and its tests.
struct Source {
    /// From `src` on.
    name: String,
    code: Vec<(usize, String)>,
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// All of `src`, but for what only tests compile.
fn sources() -> Vec<Source> {
    let root = Path::new(kit::ROOT);
    let mut paths = Vec::new();
    files(&root.join("src"), &mut paths);
    paths.sort();
    assert!(paths.len() > 20, "the sources are found");
    let sources = paths.into_iter().map(|path| Source {
        name: path
            .strip_prefix(root)
            .expect("below the root")
            .to_str()
            .expect("text")
            .replace('\\', "/"),
        code: code_of(&fs::read_to_string(&path).expect("readable")),
    });
    sources
        .filter(|source| !source.name.contains("/tests/"))
        .filter(|source| {
            !["tests.rs", "models.rs"]
                .iter()
                .any(|name| source.name.ends_with(name))
        })
        .collect()
}

/// The lines that are compiled into the library, with their numbers: no comments, no strings' contents, no test modules.
fn code_of(text: &str) -> Vec<(usize, String)> {
    let mut code = Vec::new();
    for (at, line) in text.lines().enumerate() {
        // Test modules are the last thing in a file.
        if matches!(
            line.trim(),
            "#[cfg(test)]" | r#"#[cfg(all(test, feature = "sim"))]"#
        ) && text
            .lines()
            .nth(at + 1)
            .is_some_and(|next| next.starts_with("mod tests"))
        {
            break;
        }
        let line = without_text(line);
        if !line.trim().is_empty() {
            code.push((at + 1, line));
        }
    }
    code
}

/// Cuts a `//` comment, and what is between quotes.
fn without_text(line: &str) -> String {
    let mut bare = String::new();
    let mut quoted = false;
    let mut characters = line.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\\' if quoted => {
                characters.next();
            }
            '"' => quoted = !quoted,
            '/' if !quoted && characters.peek() == Some(&'/') => break,
            _ if !quoted => bare.push(character),
            _ => {}
        }
    }
    bare
}

/// Whether `path`, a piece of Rust such as `mio` or `Instant::now`, stands in `line` as words of its own.
fn names(line: &str, path: &str) -> bool {
    let word = |character: Option<char>| character.is_some_and(|c| c.is_alphanumeric() || c == '_');
    line.match_indices(path).any(|(at, _)| {
        !word(line[..at].chars().next_back()) && !word(line[at + path.len()..].chars().next())
    })
}

/// Fails with every line of the files chosen by `whose` that names one of `paths`.
#[track_caller]
fn no_file_names(paths: &[&str], whose: impl Fn(&str) -> bool) {
    let mut wrong = Vec::new();
    let mut looked = 0;
    for source in sources().iter().filter(|source| whose(&source.name)) {
        looked += 1;
        for (number, line) in &source.code {
            if let Some(path) = paths.iter().find(|path| names(line, path)) {
                wrong.push(format!(
                    "{}:{number} names {path}: {}",
                    source.name,
                    line.trim()
                ));
            }
        }
    }
    assert!(looked > 0, "some file is meant");
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn in_proto(name: &str) -> bool {
    name.starts_with("src/proto/")
}

#[test]
fn proto_has_no_socket_and_no_clock() {
    no_file_names(
        &[
            "mio",
            "std::net",
            "socket2",
            "Instant",
            "SystemTime",
            "std::thread",
            "std::fs",
        ],
        |name| in_proto(name) && name != "src/proto/tls/pem.rs",
    );
    // It reads certificates from files, before there is a connection.
    no_file_names(
        &["mio", "std::net", "socket2", "Instant", "SystemTime"],
        |name| name == "src/proto/tls/pem.rs",
    );
}

#[test]
fn proto_names_nothing_above_it() {
    let above = [
        "crate::reactor",
        "crate::server",
        "crate::handler",
        "crate::handle",
        "crate::config",
        "crate::access",
        "crate::sim",
    ];
    no_file_names(&above, in_proto);
}

#[test]
fn only_the_front_door_and_the_shards_know_the_server() {
    no_file_names(&["crate::server", "super::server"], |name| {
        name != "src/lib.rs" && name != "src/shards.rs" && !name.starts_with("src/sim/")
    });
    no_file_names(&["crate::shards", "super::shards"], |name| {
        name != "src/lib.rs"
    });
}

/// The observer is a service as a user's: nothing below knows it, and it knows nothing that runs it.
#[test]
fn the_observer_is_a_user_of_the_server() {
    no_file_names(&["crate::observer", "super::observer"], |name| {
        name != "src/lib.rs" && !name.starts_with("src/observer")
    });
    no_file_names(
        &["crate::reactor", "crate::server", "crate::shards"],
        |name| name.starts_with("src/observer") || name == "src/serialize.rs",
    );
    no_file_names(&["serde_json", "httparse"], |name| {
        !name.starts_with("src/observer/")
    });
}

/// The public vocabulary imports nothing: every module may import it.
#[test]
fn the_vocabulary_imports_nothing_above_it() {
    let rooms = [
        "crate::reactor",
        "crate::server",
        "crate::handler",
        "crate::handle",
    ];
    for file in [
        "src/reason.rs",
        "src/id.rs",
        "src/stats.rs",
        "src/error.rs",
        "src/config/mod.rs",
        "src/config/check.rs",
        "src/config/connect.rs",
        "src/config/listen.rs",
        "src/config/server.rs",
        "src/config/socket.rs",
        "src/addr/parse.rs",
        "src/access.rs",
        "src/addr.rs",
        "src/alarm.rs",
        "src/histogram.rs",
        "src/recent.rs",
    ] {
        no_file_names(&rooms, |name| name == file);
    }
}

/// The user's side does not know what runs it.
#[test]
fn what_the_user_holds_does_not_know_the_reactor() {
    for file in [
        "src/handler.rs",
        "src/handler/conn.rs",
        "src/handler/outgoing.rs",
        "src/handle.rs",
        "src/handle/error.rs",
        "src/handle/liveness.rs",
        "src/handle/merge.rs",
        "src/handle/queue.rs",
        "src/handle/route.rs",
        "src/handler/control.rs",
        "src/handler/own_events.rs",
        "src/handler/sending.rs",
        "src/detached.rs",
        "src/tree.rs",
        "src/metrics.rs",
    ] {
        no_file_names(&["crate::reactor", "crate::server"], |name| name == file);
    }
}

#[test]
fn the_reactor_does_not_know_its_owner() {
    no_file_names(&["crate::server", "crate::sim"], |name| {
        name.starts_with("src/reactor/")
    });
}

#[test]
fn one_room_names_rustls() {
    no_file_names(&["rustls"], |name| {
        !name.starts_with("src/proto/tls/") && name != "src/lib.rs"
    });
    // The front door shows it to users, and does nothing else with it.
    let front = sources()
        .into_iter()
        .find(|source| source.name == "src/lib.rs")
        .expect("there");
    for (number, line) in front.code.iter().filter(|(_, line)| names(line, "rustls")) {
        assert!(
            line.trim().starts_with("pub use rustls"),
            "src/lib.rs:{number}: {line}"
        );
    }
}

#[test]
fn one_folder_names_mio() {
    no_file_names(&["mio"], |name| !name.starts_with("src/reactor/os_mio/"));
}

#[test]
fn the_clock_is_read_in_one_place() {
    no_file_names(
        &["Instant::now", "Instant", "SystemTime", "clock_gettime"],
        |name| name != "src/reactor/clock.rs",
    );
}

/// The module that a source is, from the crate on.
fn module_of(name: &str) -> Vec<&str> {
    let path = name
        .trim_start_matches("src/")
        .trim_end_matches(".rs")
        .trim_end_matches("/mod")
        .trim_end_matches("lib");
    path.split('/').filter(|part| !part.is_empty()).collect()
}

/// The files that a source takes names from, by `use` lines at its top level.
fn imports<'a>(source: &'a Source, files: &BTreeMap<Vec<&str>, &'a str>) -> BTreeSet<&'a str> {
    let module = module_of(&source.name);
    let mut imported = BTreeSet::new();
    for (_, line) in &source.code {
        let Some(path) = line.strip_prefix("use ") else {
            continue;
        };
        let mut from = module.clone();
        for part in path
            .split([':', ';', '{', ' '])
            .filter(|part| !part.is_empty())
        {
            match part {
                "crate" => from.clear(),
                "self" => {}
                "super" => drop(from.pop()),
                part => from.push(part),
            }
        }
        while !from.is_empty() && !files.contains_key(&from) {
            from.pop();
        }
        let file = files.get(&from).filter(|_| from != module);
        imported.extend(file.filter(|_| !from.is_empty()));
    }
    imported
}

/// A part is understood without the parts that use it.
#[test]
fn no_files_import_each_other() {
    let sources = sources();
    let files: BTreeMap<_, _> = sources
        .iter()
        .map(|source| (module_of(&source.name), source.name.as_str()))
        .collect();
    let mut left: BTreeMap<_, _> = sources
        .iter()
        .map(|source| (source.name.as_str(), imports(source, &files)))
        .collect();
    assert!(left["src/reactor/accept.rs"].contains("src/reactor/core.rs"));
    // Whatever imports nothing that is left is in no circle.
    while let Some(free) = left.iter().find(|(_, from)| from.is_empty()) {
        let free = *free.0;
        left.remove(free);
        for from in left.values_mut() {
            from.remove(free);
        }
    }
    assert!(left.is_empty(), "circles in {left:#?}");
}

/// The greps above see what they are to see.
#[test]
fn the_reading_itself() {
    assert!(names("use mio::net::TcpStream;", "mio"));
    assert!(names(
        "    let now = std::time::Instant::now();",
        "Instant::now"
    ));
    assert!(!names("mod os_mio;", "mio"));
    assert!(!names("use crate::handler::Handler;", "crate::handle"));
    assert_eq!(
        without_text(r#"let a = "mio \" // x"; b // mio"#),
        "let a = ; b "
    );
    let code = code_of("a\n/// mio\nb\n#[cfg(test)]\nmod tests {\n    mio\n}\n");
    assert_eq!(code, [(1, "a".to_owned()), (3, "b".to_owned())]);
}

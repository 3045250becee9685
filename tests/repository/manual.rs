//! The handbook does not go stale: it names every reason, its tables are tables, what it points at is there, and its formula
//! for memory holds.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use kit::ROOT;
use portcullis::sim::Sim;
use portcullis::{CloseReason, Config, Context, Framing, Handler, Listen, Message, Outcome};

/// The pages, by name.
fn pages() -> Vec<(String, String)> {
    let mut pages = Vec::new();
    for entry in fs::read_dir(format!("{ROOT}/src/manual")).expect("the folder") {
        let path = entry.expect("an entry").path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .expect("text")
            .to_owned();
        if let Some(name) = name.strip_suffix(".md") {
            pages.push((
                name.to_owned(),
                fs::read_to_string(&path).expect("readable"),
            ));
        }
    }
    pages.sort();
    assert!(pages.len() >= 10, "{} pages were found", pages.len());
    pages
}

fn page(name: &str) -> String {
    fs::read_to_string(format!("{ROOT}/src/manual/{name}.md")).expect("readable")
}

/// The cells of a table's row.
fn cells(line: &str) -> Option<Vec<String>> {
    let inner = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    // A bar inside a cell is written with a backslash.
    let inner = inner.replace("\\|", "\u{1}");
    Some(
        inner
            .split('|')
            .map(|cell| cell.trim().replace('\u{1}', "|"))
            .collect(),
    )
}

/// All rows of a page's tables, without what is between fences.
fn rows(text: &str) -> Vec<(usize, Option<Vec<String>>)> {
    let mut fenced = false;
    let mut rows = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.starts_with("```") {
            fenced = !fenced;
        }
        rows.push((number, if fenced { None } else { cells(line) }));
    }
    rows
}

/// A row for each, in their order, with the words that are in logs and metrics.
#[test]
fn the_table_of_reasons_has_all_of_them() {
    let text = page("operating");
    let start = text.find("# Why connections end").expect("the section");
    let section = &text[start..];
    let end = section[1..].find("\n# ").expect("another section");
    let rows: Vec<_> = rows(&section[..end])
        .into_iter()
        .filter_map(|(_, row)| row)
        .skip(2)
        .collect();
    let expected: Vec<_> = CloseReason::ALL
        .iter()
        .map(|reason| (format!("`{reason:?}`"), reason.to_string()))
        .collect();
    let named: Vec<_> = rows
        .iter()
        .map(|row| (row[0].clone(), row[1].clone()))
        .collect();
    assert_eq!(named, expected);
    for row in &rows {
        assert!(
            row.len() == 4 && !row[2].is_empty() && !row[3].is_empty(),
            "{row:?}"
        );
    }
}

/// Every row has as many cells as its table's head.
#[test]
fn the_tables_are_tables() {
    let mut tables = 0;
    for (name, text) in pages() {
        let mut width = None;
        for (number, row) in rows(&text) {
            match (&row, width) {
                (None, _) => width = None,
                (Some(row), None) => {
                    width = Some(row.len());
                    tables += 1;
                }
                (Some(row), Some(width)) => assert_eq!(row.len(), width, "{name}.md:{number}"),
            }
        }
    }
    assert!(tables > 30, "{tables} tables were found");
}

/// Files of the repository that are named are there.
#[test]
fn what_the_pages_point_at_exists() {
    let mut pointed = BTreeSet::new();
    for (name, text) in pages() {
        for word in text.split(|c: char| !(c.is_alphanumeric() || "/._-".contains(c))) {
            let path = word.trim_end_matches(['.', '-']);
            if ["examples/", "tests/", "fuzz/"]
                .iter()
                .any(|folder| path.starts_with(folder))
            {
                assert!(
                    Path::new(ROOT).join(path).exists(),
                    "{name}.md points at {path}"
                );
                pointed.insert(path.to_owned());
            }
        }
    }
    assert!(pointed.len() > 10, "{pointed:?}");
}

const KIB: usize = 1024;

/// The page's formula, without the state of the connection, which is not in a buffer.
fn worst(frame_in: usize, output_limit: usize, frame_out: usize) -> usize {
    2 * (frame_in + 64 * KIB + output_limit + frame_out)
}

/// On request sends until there is no more room, for any reader.
struct Talks(usize);

impl Handler for Talks {
    fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_>, _: Message) -> Outcome {
        while cx.conn.send(vec![b'x'; self.0]).is_ok() {}
        Ok(())
    }
}

fn world(listen: Listen, frame: usize) -> (Sim, SocketAddr) {
    let mut sim = Sim::new(1, Config::new(), ());
    let addr = sim
        .listen(listen, move |_: &mut (), _| Talks(frame))
        .expect("listen");
    (sim, addr)
}

/// A peer that sends all but the end of the longest frame, and then takes nothing: it does not get beyond the formula, and comes
/// near what is in it.
#[test]
fn the_formula_for_memory_holds() {
    for (frame_in, limit, frame_out) in [
        (64 * KIB - 1, 1024 * KIB, 64 * KIB - 1),
        (64 * KIB - 1, 64 * KIB, 4 * KIB),
        (4 * KIB, 33 * KIB, 4 * KIB),
        (4 * KIB, 256 * KIB, 60 * KIB),
    ] {
        let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
            listen.conn.max_frame = Some(frame_in);
            listen.conn.low_watermark = KIB;
            listen.conn.high_watermark = 32 * KIB;
            listen.conn.output_limit = limit;
        });
        let (mut sim, addr) = world(listen, frame_out);
        let client = sim.connect(addr).expect("it listens");
        sim.set_reading(client, false);
        sim.set_send_buffer(client, 1);
        let header = u16::try_from(frame_in).expect("packet-2").to_be_bytes();
        sim.send(client, &[&header[..], &vec![b'x'; frame_in - 1]].concat());
        sim.settle();
        let id = sim.control().connections()[0].id;
        sim.handle().notify(id, ()).expect("live");
        sim.settle();
        let (held, most) = (sim.stats().memory, worst(frame_in, limit, frame_out));
        assert!(held <= most, "{held} bytes are held, the page says {most}");
        assert!(
            held >= frame_in + limit - KIB,
            "{held} bytes are held, and that is all that there is"
        );
    }
}

/// "Buffers grow with received bytes": a header alone costs nothing, and an idle connection owns
/// nothing.
#[test]
fn a_promise_costs_nothing() {
    struct Echo;
    impl Handler for Echo {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            cx.conn.send(frame)?;
            Ok(())
        }
    }
    let mut sim = Sim::new(1, Config::new(), ());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet4);
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, b"\0\0\0\x02hi");
    sim.settle();
    assert_eq!(sim.stats().memory, 0, "an idle connection holds no buffer");
    sim.send(client, &0x0080_0000_u32.to_be_bytes());
    sim.settle();
    let held = sim.stats().memory;
    assert!(held <= KIB, "{held} bytes for a header of 8 MiB");
}

#[test]
fn the_readme_knows_the_number_of_reasons() {
    let words = format!("**One of {} reasons**", CloseReason::ALL.len());
    assert!(include_str!("../../README.md").contains(&words), "{words}");
}

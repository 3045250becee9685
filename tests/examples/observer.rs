//! The observer's page in a real browser: it shows, follows, sorts, filters and kills, in both themes, and does not grow. The
//! echo example serves it.
//!
//! Ten minutes under load, with the figures at the end:
//!
//!     PORTCULLIS_OBSERVED_SECONDS=600 cargo test --test examples observer:: -- --nocapture
//!
//! With `PORTCULLIS_SCREENSHOTS=FOLDER` a picture in each theme is made, after a minute.

use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use kit::net::{await_end, connect, example, have, packet2, ping, reset, spawn, tcp, ChildProcess};
use portcullis::{
    Alarm, Close, Config, Connect, Context, Framing, Handler, Listen, Observer, Outcome, Quota,
    Rate, Server,
};
use serde_json::Value;
use std::io::Write;

use super::browser::Browser;

const MINUTE: Duration = Duration::from_secs(60);

const TOKEN: &str = "not-so-easily-guessed";

/// The example with an observer, the echo's address, and the page's.
fn start(options: &[&str]) -> (ChildProcess, SocketAddr, String) {
    let more = ["--observer", "127.0.0.1:0"];
    let (server, addr) = ChildProcess::echo(&[&more, options].concat());
    let _how_to_try = server.line();
    let line = server.line();
    let url = line.strip_prefix("observer on ").expect("the page's URL");
    (server, addr, url.to_owned())
}

fn port(client: &TcpStream) -> u16 {
    client.local_addr().expect("an address").port()
}

/// The page has had a snapshot.
const LIVE: &str = "document.getElementById('status')?.textContent === 'live'";

/// The visible rows of connections that are not the observer's, as their addresses.
const ROWS: &str = "[...document.querySelectorAll('#tree tr.leaf:not([hidden])')].map(row => \
                    row.querySelector('code').textContent)";

/// An expression for the row of a client.
fn row(client: &TcpStream) -> String {
    let port = port(client);
    format!(
        "[...document.querySelectorAll('#tree tr.leaf:not([hidden])')].find(row => \
         row.querySelector('code').textContent === '127.0.0.1:{port}')"
    )
}

/// The clients of `all` in the order in which the page shows them.
fn order(browser: &mut Browser, all: &[TcpStream]) -> Vec<usize> {
    let shown = browser.eval(ROWS);
    let shown: Vec<&str> = shown
        .as_array()
        .expect("rows")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let position = |addr: &str| {
        let mut clients = all.iter();
        clients.position(|client| addr == format!("127.0.0.1:{}", port(client)))
    };
    shown.into_iter().filter_map(position).collect()
}

/// A sort or filter is shown once the answer to this query has come.
fn found(query: &str) -> String {
    format!("document.documentElement.dataset.found === '{query}'")
}

fn click(browser: &mut Browser, element: &str) {
    browser.eval(&format!("{element}.click()"));
}

#[test]
fn it_shows_sorts_filters_and_kills() {
    if !have("chromium", "--version") {
        return;
    }
    let (server, addr, url) = start(&["--kill-token", TOKEN]);
    // The age rises with the number; the traffic has another order.
    let mut clients: Vec<TcpStream> = Vec::new();
    for size in [300, 5000, 20, 1000] {
        let mut client = connect(addr);
        ping(&mut client, &vec![7; size]);
        clients.push(client);
    }
    let mut browser = Browser::start("observer");
    browser.open(&url);
    browser.until(LIVE);
    browser.until(&found("queue desc "));
    let text = browser.eval("document.body.innerText");
    let text = text.as_str().expect("text");
    for part in [
        "of 1,028 connections",
        "listening",
        "observer",
        "Iteration time",
        "No connection has ended.",
        "idle ",
    ] {
        assert!(text.contains(part), "{part:?} in {text}");
    }

    // It follows: a new client, an end with its reason, and the numbers.
    let mut guest = connect(addr);
    ping(&mut guest, b"hello");
    browser.until(&format!("{} !== undefined", row(&guest)));
    let id = browser.eval(&format!(
        "{}.querySelector('span').textContent",
        row(&guest)
    ));
    guest.write_all(&packet2(b"half")[..3]).expect("sent");
    let gone = row(&guest);
    drop(guest);
    browser.until(&format!("{gone} === undefined"));
    browser.until("document.getElementById('reasons').innerText.includes('truncated')");
    browser.until("document.getElementById('closes').innerText.includes('truncated')");
    let id = id
        .as_str()
        .expect("text")
        .split(' ')
        .next()
        .expect("an id")
        .to_owned();
    browser.until(&format!(
        "document.getElementById('closes').innerText.includes('{id}')"
    ));

    // Sorted by each column, in both directions.
    let sort = |name: &str| format!("document.querySelector('[data-sort={name}]')");
    for (name, first, expected) in [
        ("age", "desc", [0, 1, 2, 3]),
        ("traffic", "desc", [1, 3, 0, 2]),
    ] {
        click(&mut browser, &sort(name));
        browser.until(&found(&format!("{name} {first} ")));
        assert_eq!(order(&mut browser, &clients), expected, "{name}");
        click(&mut browser, &sort(name));
        browser.until(&found(&format!("{name} asc ")));
        let reversed: Vec<usize> = expected.into_iter().rev().collect();
        assert_eq!(order(&mut browser, &clients), reversed, "{name}");
    }
    click(&mut browser, &sort("address"));
    browser.until(&found("address asc "));
    let mut by_port = vec![0, 1, 2, 3];
    by_port.sort_by_key(|&at: &usize| port(&clients[at]));
    assert_eq!(order(&mut browser, &clients), by_port);

    // Filtered: words of one connection.
    let words = format!(":{} open", port(&clients[2]));
    browser.eval(&format!(
        "(() => {{ const filter = document.getElementById('filter'); filter.value = '{words}'; \
         filter.dispatchEvent(new Event('input')); }})()"
    ));
    browser.until(&found(&format!("address asc {words}")));
    assert_eq!(order(&mut browser, &clients), [2]);
    let shown = browser.eval("document.getElementById('shown').textContent");
    assert_eq!(shown, "1 connection");

    // Killed, with the right token only.
    let victim = clients.remove(2);
    let dialog = "document.getElementById('dialog')";
    click(
        &mut browser,
        &format!("{}.querySelector('.kill')", row(&victim)),
    );
    browser.until(&format!("{dialog}.open"));
    for (token, outcome) in [
        ("a wrong token here", "'not the right token'"),
        (TOKEN, "''"),
    ] {
        browser.eval(&format!(
            "document.getElementById('token').value = '{token}'"
        ));
        click(&mut browser, "document.getElementById('confirm')");
        match token {
            TOKEN => browser.until(&format!("!{dialog}.open")),
            _ => browser.until(&format!(
                "document.getElementById('outcome').textContent === {outcome}"
            )),
        }
    }
    await_end(&mut &victim);
    browser.until("document.getElementById('closes').innerText.includes('killed')");
    for client in &mut clients {
        ping(client, b"still there");
    }
    // The answer with 403 is one that a browser notes.
    browser
        .complaints
        .retain(|complaint| !complaint.contains("403"));
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);

    // Both themes, as the system prefers and by the button.
    let theme = "document.documentElement.dataset.theme";
    for (scheme, other) in [("dark", "light"), ("light", "dark")] {
        browser.prefer(scheme);
        browser.until(&format!("{theme} === '{scheme}'"));
        click(&mut browser, "document.getElementById('theme')");
        browser.until(&format!("{theme} === '{other}'"));
        browser.eval("localStorage.clear()");
        browser.open(&url);
        browser.until(LIVE);
    }
    drop(browser);
    server.signal("TERM");
    let (status, _, log) = server.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
    assert!(log.contains("killed"), "{log}");
}

/// Clients that come, echo, stall and go in all ways, until `over`.
fn load(addr: SocketAddr, over: &AtomicBool) {
    let mut stalled = connect(addr);
    stalled.set_nonblocking(true).expect("a socket");
    let mut round = 0_usize;
    while !over.load(Ordering::Relaxed) {
        round += 1;
        let mut client = connect(addr);
        for size in [1, 100, 1000 + round % 7000] {
            ping(&mut client, &vec![7; size]);
        }
        match round % 5 {
            0 => reset(client),
            1 => client.write_all(b"\x10").expect("sent"),
            _ => {}
        }
        // It is full at some time, and ends by the write timeout.
        if stalled
            .write(&packet2(&[7; 30_000]))
            .is_ok_and(|written| written == 0)
            || round % 5000 == 0
        {
            stalled = connect(addr);
            stalled.set_nonblocking(true).expect("a socket");
        }
        thread::park_timeout(Duration::from_millis(2));
    }
}

/// Ends the load, also if the test fails.
struct EndOf<'a>(&'a AtomicBool);

impl Drop for EndOf<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Resident memory of a process in KiB: VmRSS of proc(5).
fn resident(server: &ChildProcess) -> u64 {
    let path = format!("/proc/{}/status", server.process());
    let status = std::fs::read_to_string(path).expect("proc");
    let mut lines = status.lines();
    let line = lines
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .expect("a line");
    let number = line.trim().trim_end_matches(" kB");
    number.parse().expect("a number")
}

/// What is kept is bounded, in the page and in the server. A number of seconds in the environment makes it a long test.
#[test]
fn neither_page_nor_server_grows_under_load() {
    if !have("chromium", "--version") {
        return;
    }
    let seconds = std::env::var("PORTCULLIS_OBSERVED_SECONDS");
    let seconds: u64 = seconds
        .ok()
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(9);
    let (server, addr, url) = start(&["--idle-timeout", "0"]);
    // More than are shown.
    let crowd: Vec<TcpStream> = (0..150).map(|_| connect(addr)).collect();
    let mut browser = Browser::start("observer-growth");
    browser.open(&url);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = EndOf(&over);
        let load = scope.spawn(|| load(addr, &over));
        let mut begin = None;
        for second in 1..=seconds {
            browser.until(&format!(
                "Number(document.documentElement.dataset.sequence) >= {second}"
            ));
            // The minute of history is full, or the test is a short one.
            if second == 90.min(seconds / 3) {
                begin = Some((browser.weight(), resident(&server)));
            }
        }
        let ((heap, nodes), memory) = begin.expect("measured");
        let ((heap_now, nodes_now), memory_now) = (browser.weight(), resident(&server));
        println!(
            "{seconds} s: heap of the page {heap} to {heap_now} bytes, {nodes} to {nodes_now} nodes, server {memory} to \
             {memory_now} KiB"
        );
        drop(end);
        load.join().expect("the load");
        assert!(nodes_now < nodes + 300, "{nodes} nodes, {nodes_now}");
        assert!(heap_now < heap + 2_000_000, "{heap} bytes, {heap_now}");
        assert!(memory_now < memory + 8 * 1024, "{memory} KiB, {memory_now}");
    });
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    drop((browser, crowd));
}

/// Does what a frame says.
struct Obedient;

impl Handler for Obedient {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        match frame {
            b"pause" => cx.conn.pause(),
            b"flood" => while cx.conn.send(vec![0; 50_000]).is_ok() {},
            b"kick" => return Err(Close::because("<b>too many</b> words").labelled("kicked")),
            frame => cx.conn.send(frame)?,
        }
        Ok(())
    }
}

/// Everything that can be seen of a server is seen.
#[test]
fn it_shows_what_holds_back_and_what_alarms() {
    if !have("chromium", "--version") {
        return;
    }
    let server = spawn(|| {
        let mut config = Config::max_connections(400);
        config.memory_limit = Some(16 << 20);
        let mut server = Server::new(config).expect("server");
        let service = |_: &mut (), _| Obedient;
        let local = |name| Listen::tcp("127.0.0.1:0", Framing::Packet2).name(name);
        let games = local("games").with(|games| games.conn.write_timeout = 10 * MINUTE);
        let games = server.listen(games, service).expect("listen");
        let chat = local("chat").with(|chat| {
            chat.conn.read_rate = Some(Rate::per_second(20_000));
            chat.max_connections = Some(100);
        });
        server.listen(chat, service).expect("listen");
        let observer = Observer::new();
        let listen = observer.listen("127.0.0.1:0").expect("loopback");
        let listen = listen.name("observer");
        server.listen_with(listen, observer).expect("listen");
        let mut control = server.control();
        for alarm in [
            Alarm::Connections(Quota::Percent(25)),
            Alarm::Memory(Quota::Percent(75)),
        ] {
            control.on_alarm(alarm, MINUTE, |_, _, _| {}).expect("good");
        }
        let games = control.listener(games).expect("open").addr;
        let options = Connect::new(Framing::Packet2);
        control.connect(games, options, Obedient).expect("begun");
        (server, ())
    });
    let (games, chat) = (
        tcp(&server.listeners[0].addr),
        tcp(&server.listeners[1].addr),
    );
    let url = format!("http://{}/", server.listeners[2].addr);
    let mut crowd: Vec<TcpStream> = (0..120).map(|_| connect(games)).collect();
    for (client, size) in crowd.iter_mut().zip((1..).map(|at| at * at % 9973 * 5)) {
        ping(client, &vec![7; size]);
    }
    let say = |addr, frame: &[u8]| {
        let mut client = connect(addr);
        client.write_all(&packet2(frame)).expect("sent");
        client
    };
    let mut held = vec![
        say(games, b"pause"),
        say(games, b"flood"),
        say(chat, b"flood"),
    ];
    let mut hasty = connect(chat);
    hasty.set_nonblocking(true).expect("a socket");
    held.push(say(games, b"kick"));
    await_end(&mut held[3]);

    let mut browser = Browser::start("observer-full");
    browser.open(&url);
    browser.until(LIVE);
    let shows = |words: &str| format!("document.body.innerText.includes('{words}')");
    // Text of a peer stays text.
    browser.until(&shows("failed (kicked): <b>too many</b> words"));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = EndOf(&over);
        let load = scope.spawn(|| load(games, &over));
        for words in [
            "Alarm: connections",
            "Alarm set: memory",
            "outgoing",
            "kicked",
        ] {
            browser.until(&shows(words));
        }
        for word in ["paused", "congested", "throttled", ""] {
            browser.eval(&format!(
                "(() => {{ const filter = document.getElementById('filter'); filter.value = '{word}'; \
                 filter.dispatchEvent(new Event('input')); }})()"
            ));
            browser.until(&found(&format!("queue desc {word}")));
            // More than its rate, all the time.
            let _ = hasty.write(&packet2(&[7; 60_000]));
            browser.until(&format!(
                "[...document.querySelectorAll('#tree tr.leaf:not([hidden]) .pill:not([hidden])')].some(pill => \
                 pill.textContent === '{word}' || '{word}' === '')"
            ));
        }
        if let Some(folder) = std::env::var_os("PORTCULLIS_SCREENSHOTS").map(PathBuf::from) {
            click(
                &mut browser,
                "document.querySelector('[data-sort=traffic]')",
            );
            for second in 1..=75 {
                let _ = hasty.write(&packet2(&[7; 60_000]));
                browser.until(&format!(
                    "Number(document.documentElement.dataset.sequence) >= {second}"
                ));
            }
            for scheme in ["light", "dark"] {
                browser.prefer(scheme);
                browser.until(&format!(
                    "document.documentElement.dataset.theme === '{scheme}'"
                ));
                browser.screenshot(&folder.join(format!("observer-{scheme}.png")), 1320, 1320);
            }
        }
        drop(end);
        load.join().expect("the load");
    });
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    assert_eq!(server.handle.stats().panics, 0);
    drop((browser, crowd, held, hasty));
}

/// The same in a terminal. Without one it prints a screen and ends.
#[test]
fn top_shows_it_in_a_terminal() {
    let (server, addr, url) = start(&["--max-connections", "77"]);
    let mut clients = [connect(addr), connect(addr)];
    for client in &mut clients {
        ping(client, b"hello");
    }
    let page = url.trim_start_matches("http://").trim_end_matches('/');
    let top = |words: &[&str]| {
        let top = ChildProcess::start(Command::new(example("top")).args(words));
        top.finish()
    };
    let (status, output, log) = top(&[page]);
    assert!(status.success(), "{log}");
    for part in [
        "connections [",
        "3 of 81",
        "listening",
        "per second",
        "ADDRESS",
        "3 match, by queue desc",
        &format!("127.0.0.1:{} ", port(&clients[0])),
        &format!("127.0.0.1:{} ", port(&clients[1])),
    ] {
        assert!(output.contains(part), "{part:?} in {output}");
    }
    let words = format!(":{}", port(&clients[1]));
    let (status, output, log) = top(&[page, "open", &words]);
    assert!(status.success(), "{log}");
    assert!(
        output.contains(&words) && output.contains("1 match"),
        "{output}"
    );
    assert!(
        !output.contains(&format!(":{} ", port(&clients[0]))),
        "{output}"
    );
    let (status, _, log) = top(&[page, "a", "b", "c", "d", "e"]);
    assert!(!status.success() && log.contains("400"), "{log}");
    server.signal("TERM");
    assert!(server.finish().0.success());
    let (status, _, log) = top(&[page]);
    assert!(!status.success() && log.starts_with("top: "), "{log}");
}

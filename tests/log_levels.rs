//! What a peer does is never in the log above debug; what concerns the owner is, under the targets that are documented.
//! One process of its own: `log` has one logger.

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kit::net::packet4;
use log::Level;
use portcullis::sim::{Call, ClientId, Scripted, Sim};
use portcullis::{
    AccessRules, AtCapacity, Close, CloseReason, Config, Context, Framing, Handler, Listen,
    Outcome, Peer, ProxyProtocol, Quota, Rate, Refuse,
};

struct Line {
    level: Level,
    target: String,
    text: String,
    #[cfg(feature = "kv")]
    fields: Vec<(String, String)>,
}

#[cfg(feature = "kv")]
fn fields(record: &log::Record<'_>) -> Vec<(String, String)> {
    use log::kv::{Error, Key, Value, VisitSource};

    struct Fields(Vec<(String, String)>);
    impl<'kvs> VisitSource<'kvs> for Fields {
        fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
            self.0.push((key.to_string(), value.to_string()));
            Ok(())
        }
    }
    let mut fields = Fields(Vec::new());
    let visited = record.key_values().visit(&mut fields);
    visited.expect("fields");
    fields.0
}

struct Memory(Mutex<Vec<Line>>);

static MEMORY: Memory = Memory(Mutex::new(Vec::new()));
/// The tests take turns with it.
static TURN: Mutex<()> = Mutex::new(());

impl log::Log for Memory {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = Line {
            level: record.level(),
            target: record.target().to_owned(),
            text: record.args().to_string(),
            #[cfg(feature = "kv")]
            fields: fields(record),
        };
        // The poll's own lines are none of ours.
        if line.target.starts_with("portcullis") {
            self.lines().push(line);
        }
    }

    fn flush(&self) {}
}

impl Memory {
    fn lines(&self) -> MutexGuard<'_, Vec<Line>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Alone with the log, which is empty.
fn capture() -> MutexGuard<'static, ()> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = log::set_logger(&MEMORY);
    log::set_max_level(log::LevelFilter::Trace);
    MEMORY.lines().clear();
    turn
}

fn taken() -> Vec<Line> {
    let lines = std::mem::take(&mut *MEMORY.lines());
    let known = ["server", "listener", "fd_exhaustion", "connection", "panic"]
        .map(|name| format!("portcullis::{name}"));
    for line in &lines {
        assert!(
            known.contains(&line.target),
            "{} is not documented: {}",
            line.target,
            line.text
        );
    }
    lines
}

/// Those above debug, as (level, target, text).
fn loud(lines: &[Line]) -> Vec<(Level, &str, &str)> {
    let loud = lines.iter().filter(|line| line.level < Level::Debug);
    loud.map(|line| {
        (
            line.level,
            &line.target["portcullis::".len()..],
            line.text.as_str(),
        )
    })
    .collect()
}

/// Nothing is loud, and each of these ends is there at debug.
#[track_caller]
fn quiet(reasons: &[CloseReason]) {
    let lines = taken();
    assert_eq!(loud(&lines), []);
    for reason in reasons {
        let told = lines.iter().any(|line| {
            line.level == Level::Debug
                && line.target == "portcullis::connection"
                && line.text.contains(&reason.to_string())
        });
        let all: Vec<_> = lines.iter().map(|line| &line.text).collect();
        assert!(told, "{reason} is not in {all:#?}");
    }
}

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        match frame {
            b"panic" => kit::planned::blow(),
            b"fail" => return Err(Close::because("as the peer wished")),
            b"abort" => cx.conn.abort(),
            b"flood" => cx.conn.send(vec![0; 200_000])?,
            frame => cx.conn.send(frame)?,
        }
        Ok(())
    }
}

fn listen() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Packet4)
}

/// A world whose own opening is forgotten.
fn world(config: Config, listen: Listen) -> (Sim, SocketAddr) {
    let mut sim = Sim::new(13, config, ());
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let lines = taken();
    assert!(loud(&lines)
        .iter()
        .all(|(level, target, _)| (*level, *target) == (Level::Info, "listener")));
    (sim, addr)
}

fn connect(sim: &mut Sim, addr: SocketAddr) -> ClientId {
    let client = sim.connect(addr).expect("a listener");
    sim.settle();
    client
}

fn say(sim: &mut Sim, addr: SocketAddr, bytes: &[u8]) -> ClientId {
    let client = connect(sim, addr);
    sim.send(client, bytes);
    sim.settle();
    client
}

const AGES: Duration = Duration::from_secs(600);

#[test]
fn a_peer_that_breaks_the_protocol_is_not_news() {
    let _turn = capture();
    let (mut sim, addr) = world(
        Config::new(),
        listen().with(|listen| listen.conn.max_frame = Some(1000)),
    );
    say(&mut sim, addr, &u32::MAX.to_be_bytes());
    let cut = say(&mut sim, addr, &packet4(b"whole")[..6]);
    sim.finish(cut);
    let reset = say(&mut sim, addr, &packet4(b"hello"));
    sim.reset(reset);
    say(&mut sim, addr, &[22, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3]);
    say(&mut sim, addr, &packet4(b"fail"));
    say(&mut sim, addr, &packet4(b"abort"));
    // Slow in every way.
    connect(&mut sim, addr);
    say(&mut sim, addr, &packet4(b"never whole")[..8]);
    let slow = connect(&mut sim, addr);
    sim.set_reading(slow, false);
    sim.send(slow, &packet4(b"flood"));
    sim.advance(AGES);
    quiet(&[
        CloseReason::FrameTooLarge,
        CloseReason::Truncated,
        CloseReason::Reset,
        CloseReason::UnexpectedTls,
        CloseReason::Failed,
        CloseReason::Aborted,
        CloseReason::IdleTimeout,
        CloseReason::FrameTimeout,
        CloseReason::WriteTimeout,
    ]);
}

#[test]
fn a_framer_that_refuses_is_not_news() {
    use portcullis::{Decoded, FrameError, Framer};
    struct Strict;
    impl Framer for Strict {
        fn decode(&mut self, _: &[u8]) -> Result<Decoded, FrameError> {
            Err(FrameError::new("not my language"))
        }
    }
    let _turn = capture();
    let (mut sim, addr) = world(
        Config::new(),
        listen().with(|listen| listen.framing = Framing::custom(|| Strict)),
    );
    say(&mut sim, addr, b"hello");
    sim.advance(AGES);
    quiet(&[CloseReason::BadFrame]);
}

/// Socket errors of every kind, and clients that the kernel loses before they are accepted.
#[test]
fn a_network_that_fails_is_not_news() {
    let _turn = capture();
    let (mut sim, addr) = world(Config::new(), listen());
    for errno in [
        libc::ECONNRESET,
        libc::ETIMEDOUT,
        libc::EHOSTUNREACH,
        libc::EIO,
    ] {
        let client = connect(&mut sim, addr);
        sim.add_fault(Scripted {
            call: Call::Read,
            after: 0,
            errno,
        });
        sim.send(client, &packet4(b"hello"));
        sim.settle();
    }
    quiet(&[
        CloseReason::Reset,
        CloseReason::TimedOut,
        CloseReason::Unreachable,
        CloseReason::Io,
    ]);
    // A whole budget of them, again and again.
    for _ in 0..3 {
        for _ in 0..64 {
            sim.add_fault(Scripted {
                call: Call::Accept,
                after: 0,
                errno: libc::ECONNABORTED,
            });
        }
        sim.connect(addr).expect("the backlog has room");
        sim.advance(Duration::from_secs(10));
    }
    assert_eq!(sim.stats().accept_errors, 192);
    let lines = taken();
    assert_eq!(loud(&lines), []);
    assert!(lines
        .iter()
        .any(|line| line.text.starts_with("clients are lost in a row")));
}

#[test]
fn a_client_that_is_not_admitted_is_not_logged_above_debug() {
    let _turn = capture();
    let config = Config::max_connections(2);
    let listen_one = listen().with(|listen| listen.max_connections = Some(1));
    let (mut sim, addr) = world(
        config,
        listen_one.with(|listen| {
            listen.at_capacity = AtCapacity::Refuse {
                farewell: Vec::new(),
            }
        }),
    );
    connect(&mut sim, addr);
    // The owner's warning: the cap is reached.
    assert_eq!(loud(&taken()).len(), 1);
    for _ in 0..100 {
        connect(&mut sim, addr);
    }
    quiet(&[CloseReason::AtCapacity]);

    let (mut sim, addr) = world(
        Config::new(),
        listen().with(|listen| listen.access_rules = AccessRules::deny_all()),
    );
    connect(&mut sim, addr);
    quiet(&[CloseReason::Denied]);

    let rate = Rate::per_second(1).burst(1);
    let (mut sim, addr) = world(
        Config::new(),
        listen().with(|listen| {
            listen.accept_rate = Some(rate);
            listen.at_capacity = AtCapacity::Refuse {
                farewell: Vec::new(),
            };
        }),
    );
    connect(&mut sim, addr);
    connect(&mut sim, addr);
    quiet(&[CloseReason::RateLimited]);

    let (mut sim, addr) = world(
        Config::new(),
        listen().with(|listen| listen.accept_rate = Some(Rate::per_second(9))),
    );
    let early = sim.connect(addr).expect("the backlog has room");
    sim.reset(early);
    sim.settle();
    quiet(&[CloseReason::ClosedEarly]);

    let mut sim = Sim::new(13, Config::new(), ());
    let door = portcullis::try_accept(|_: &mut (), _: Peer| Err::<Echo, _>(Refuse::silently()));
    let addr = sim.listen_with(listen(), door).expect("listen");
    taken();
    connect(&mut sim, addr);
    quiet(&[CloseReason::Refused]);
}

#[test]
fn proxies_and_handshakes_that_fail_are_not_news() {
    let _turn = capture();
    let behind = || {
        let listen = listen().with(|listen| listen.proxy_protocol = ProxyProtocol::Required);
        listen.with(|listen| listen.trusted_proxies = Some(AccessRules::allow_all()))
    };
    let (mut sim, addr) = world(
        Config::new(),
        behind().with(|listen| listen.source_limits.connections = Some(1)),
    );
    say(&mut sim, addr, b"GET / HTTP/1.1\r\n\r\n");
    connect(&mut sim, addr);
    let mute = connect(&mut sim, addr);
    sim.finish(mute);
    for _ in 0..2 {
        say(
            &mut sim,
            addr,
            b"PROXY TCP4 203.0.113.9 192.0.2.1 4711 25\r\n",
        );
    }
    sim.advance(AGES);
    quiet(&[
        CloseReason::BadProxyHeader,
        CloseReason::HandshakeTimeout,
        CloseReason::ClosedEarly,
        CloseReason::SourceLimited,
    ]);
    // No proxy is trusted.
    let (mut sim, addr) = world(
        Config::new(),
        behind().with(|listen| listen.trusted_proxies = Some(AccessRules::deny_all())),
    );
    connect(&mut sim, addr);
    quiet(&[CloseReason::Denied]);
    // Too many that are not open yet.
    let crowded = Config::max_connections(40)
        .with(|config| config.pending_limits.connections = Quota::Count(2));
    let (mut sim, addr) = world(crowded, behind());
    for _ in 0..10 {
        sim.connect(addr).expect("the backlog has room");
    }
    sim.advance(Duration::from_secs(5));
    quiet(&[CloseReason::Evicted]);
}

/// One connection that fills the server's memory.
#[test]
fn a_connection_with_large_buffers_is_not_logged_above_debug() {
    let _turn = capture();
    let (mut sim, addr) = world(
        Config::new().with(|config| config.memory_limit = Some(300_000)),
        listen(),
    );
    let greedy: Vec<_> = (0..3).map(|_| connect(&mut sim, addr)).collect();
    for client in greedy {
        sim.set_reading(client, false);
        sim.send(client, &packet4(b"flood"));
        sim.send(client, &packet4(b"flood"));
    }
    sim.advance(AGES);
    quiet(&[CloseReason::OverMemory]);
}

#[cfg(feature = "tls")]
#[test]
fn a_peer_that_fails_at_tls_is_not_news() {
    use std::io::Write;
    use std::sync::Arc;

    use kit::net::{await_end, local, ping, spawn_echo};
    use kit::tls::{secure, session, Site, VERSIONS};

    let _turn = capture();
    let site = Site::new();
    let server = spawn_echo(Config::new(), local().tls(Arc::new(site.server())));
    taken();
    // Not TLS; broken TLS; a client that leaves in the middle, and one that does not trust the
    // issuer.
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[22, 3, 3, 0, 4, 1, 0, 0, 99],
    ] {
        let mut client = kit::net::connect(server.addr());
        client.write_all(garbage).expect("sent");
        client.shutdown(std::net::Shutdown::Write).expect("finish");
        await_end(&mut client);
    }
    let leaves = kit::net::connect(server.addr());
    server.until("it is in", |stats| stats.accepted == 3);
    drop(leaves);
    let stranger = Site::new();
    let handshake = kit::tls::handshake_over(
        kit::net::connect(server.addr()),
        session(&stranger.client(VERSIONS[0])),
    );
    assert!(handshake.is_err());
    // Garbage on an open connection, and an end without goodbye.
    let mut client = secure(server.addr(), &site.client(VERSIONS[0]));
    ping(&mut client, b"hello");
    client
        .sock
        .write_all(&[23, 3, 3, 0, 5, 1, 2, 3, 4, 5])
        .expect("sent");
    await_end(&mut client.sock);
    let mut client = secure(server.addr(), &site.client(VERSIONS[0]));
    ping(&mut client, b"hello");
    client
        .sock
        .shutdown(std::net::Shutdown::Write)
        .expect("finish");
    await_end(&mut client.sock);
    server.until("all have ended", |stats| {
        stats.accepted == 6 && stats.open == 0
    });
    quiet(&[
        CloseReason::NotTls,
        CloseReason::TlsHandshake,
        CloseReason::Tls,
        CloseReason::TlsTruncated,
    ]);
    server.finish();
    taken();
}

/// A frame from another thread for a peer that has gone is no news either.
#[test]
fn a_late_frame_is_not_news() {
    let _turn = capture();
    let (mut sim, addr) = world(Config::new(), listen());
    let client = connect(&mut sim, addr);
    let id = sim.control().connections()[0].id;
    let handle = sim.handle();
    sim.reset(client);
    handle
        .send(id, "too late")
        .expect("it is alive as far as we know");
    sim.settle();
    assert_eq!(sim.stats().undeliverable, 1);
    quiet(&[CloseReason::Reset]);
}

/// What the owner is to know, each under its target and once.
#[test]
fn what_concerns_the_owner_is_loud() {
    let _turn = capture();
    let (mut sim, addr) = world(Config::new(), listen().name("games"));
    let lines = |sim: &mut Sim| {
        sim.settle();
        let lines = taken();
        let loud = loud(&lines).into_iter();
        loud.map(|(level, target, text)| {
            (
                level,
                target.to_owned(),
                text.split([' ', ';']).take(3).collect::<Vec<_>>().join(" "),
            )
        })
        .collect::<Vec<_>>()
    };
    let said =
        |level: Level, target: &str, text: &str| vec![(level, target.to_owned(), text.to_owned())];

    say(&mut sim, addr, &packet4(b"panic"));
    assert_eq!(
        lines(&mut sim),
        said(Level::Error, "panic", "a handler panicked:")
    );
    connect(&mut sim, addr);
    let id = sim.control().connections()[0].id;
    sim.control().kill(id);
    assert_eq!(
        lines(&mut sim),
        said(Level::Warn, "connection", "killed  listener")
    );
    sim.control()
        .reconfigure_listener("games", |listen| listen.max_connections = Some(9))
        .expect("an option");
    assert_eq!(
        lines(&mut sim),
        said(Level::Info, "listener", "listener games: its")
    );

    // One warning however long it lasts, and one line at its end.
    sim.set_descriptor_limit(1);
    sim.connect(addr).expect("the backlog has room");
    sim.advance(Duration::from_secs(60));
    assert_eq!(
        lines(&mut sim),
        said(Level::Warn, "fd_exhaustion", "no new connections")
    );
    sim.set_descriptor_limit(usize::MAX);
    sim.advance(Duration::from_secs(60));
    assert_eq!(
        lines(&mut sim),
        said(Level::Info, "fd_exhaustion", "accepting again ")
    );

    let handle = sim.handle();
    handle.post(|_, _| kit::planned::blow()).expect("posted");
    assert_eq!(lines(&mut sim), said(Level::Error, "panic", "a posted job"));

    sim.add_fault(Scripted {
        call: Call::Accept,
        after: 0,
        errno: libc::EPERM,
    });
    sim.connect(addr).expect("the backlog has room");
    sim.advance(Duration::from_secs(1));
    assert_eq!(
        lines(&mut sim),
        said(Level::Warn, "listener", "cannot accept from")
    );

    sim.control().drain(Duration::ZERO);
    sim.advance(Duration::from_secs(1));
    let drained = lines(&mut sim);
    let targets: Vec<_> = drained
        .iter()
        .map(|(level, target, _)| (*level, target.as_str()))
        .collect();
    assert_eq!(
        targets,
        [
            (Level::Info, "server"),
            (Level::Info, "listener"),
            (Level::Info, "server")
        ]
    );
}

/// A deny list is set again with each new entry: one line each, and not the list in each.
/// Quotes its peer in the text of an error or of a panic.
struct Quoting;

impl Handler for Quoting {
    fn on_frame(&mut self, _: &mut Context<'_>, frame: &[u8]) -> Outcome {
        let text = String::from_utf8_lossy(frame);
        match text.strip_prefix("panic ") {
            Some(text) => std::panic::resume_unwind(Box::new(text.to_owned())),
            None => Err(Close::because(text)),
        }
    }
}

/// A line feed would forge a record, ESC would command a terminal, U+202E would turn a line around.
#[test]
fn a_peer_cannot_forge_a_line() {
    let _turn = capture();
    let evil = "bad\n2026 ERROR all is lost\r\u{1b}[2J\u{9b}31m\0\u{202e}\u{2066}\u{2028}";
    let (mut sim, _) = world(Config::new(), listen());
    let addr = sim
        .listen(listen().name("quoting"), |_: &mut (), _| Quoting)
        .expect("listen");
    taken();
    say(&mut sim, addr, &packet4(evil.as_bytes()));
    say(&mut sim, addr, &packet4(format!("panic {evil}").as_bytes()));
    say(&mut sim, addr, &packet4("long ".repeat(2000).as_bytes()));
    sim.advance(AGES);
    let closes = sim.control().recent_closes();
    let mut shown: Vec<String> = taken().into_iter().map(|line| line.text).collect();
    shown.extend(closes.iter().map(ToString::to_string));
    shown.extend(
        closes
            .iter()
            .filter_map(|close| close.error.as_ref())
            .map(ToString::to_string),
    );
    shown.push(sim.control().tree(10).to_string());
    let quoted = shown
        .iter()
        .filter(|text| text.contains("bad\\n2026 ERROR"));
    assert!(
        quoted.count() >= 4,
        "three log lines, a close and its error: {shown:#?}"
    );
    for text in &shown {
        let hidden = |character: char| {
            let turns = matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            turns || character == '\u{2028}' || (character.is_control() && character != '\n')
        };
        assert!(!text.contains(hidden) && text.len() < 2000, "{text:?}");
        assert!(
            text.starts_with("server") || !text.contains('\n'),
            "{text:?}"
        );
    }
}

#[test]
fn a_long_list_is_not_repeated_in_the_log() {
    let _turn = capture();
    let (mut sim, _) = world(Config::new(), listen().name("games"));
    let mut rules = AccessRules::allow_all()
        .deny("192.0.2.1")
        .expect("an address");
    sim.control()
        .reconfigure_listener("games", |listen| listen.access_rules = rules.clone())
        .expect("good");
    let lines = taken();
    assert_eq!(
        (lines[0].level, lines[1].level),
        (Level::Info, Level::Debug)
    );
    assert_eq!(lines[0].text, "listener games: its options have changed");
    assert!(
        lines[1].text.contains("deny 192.0.2.1/32, allow all"),
        "{}",
        lines[1].text
    );
    for number in 0..5000_u32 {
        let address = std::net::Ipv4Addr::from(0x0A00_0000 + number).to_string();
        rules = rules.deny(&address).expect("an address");
    }
    sim.control()
        .reconfigure_listener("games", |listen| {
            listen.access_rules = rules.clone();
            listen.trusted_proxies = Some(rules);
        })
        .expect("good");
    let lines = taken();
    assert!(lines[1].text.contains("5001 rules, allow all") && lines[1].text.len() < 2000);
}

/// The lines above debug since the last call, as one text.
fn loud_text() -> String {
    let lines = taken();
    let loud = loud(&lines);
    let lines = loud
        .iter()
        .map(|(level, target, text)| format!("{level} {target}: {text}\n"));
    lines.collect()
}

const MINUTE: Duration = Duration::from_secs(60);

/// Its connections do not end by themselves.
fn patient() -> Listen {
    listen().with(|listen| listen.conn.idle_timeout = Duration::MAX)
}

/// Clients that come and go at the cap write two lines, whatever their number.
#[test]
fn a_cap_that_is_reached_has_one_warning_and_one_end() {
    for (config, listen, target) in [
        (Config::max_connections(2), patient(), "server"),
        (
            Config::new(),
            patient().with(|listen| listen.max_connections = Some(2)),
            "listener",
        ),
    ] {
        let _turn = capture();
        let (mut sim, addr) = world(config, listen);
        let _stays = connect(&mut sim, addr);
        assert_eq!(loud_text(), "");
        let mut other = connect(&mut sim, addr);
        let begun = loud_text();
        assert!(begun.starts_with(&format!("WARN {target}: ")), "{begun}");
        assert_eq!(begun.lines().count(), 1);
        for _ in 0..100 {
            sim.reset(other);
            sim.advance(MINUTE - Duration::from_secs(1));
            other = connect(&mut sim, addr);
            assert_eq!(loud_text(), "", "the same episode");
        }
        sim.reset(other);
        sim.advance(2 * MINUTE);
        let over = loud_text();
        assert!(over.starts_with(&format!("INFO {target}: ")), "{over}");
        assert!(over.contains("101 times"), "{over}");
        assert_eq!(over.lines().count(), 1);
        assert_eq!(sim.next_timeout(), None, "nothing is left to do");
        connect(&mut sim, addr);
        connect(&mut sim, addr);
        assert!(loud_text().starts_with("WARN"), "another episode");
    }
}

/// So is a cap that is lowered below the number of connections.
#[test]
fn a_lowered_cap_is_reached() {
    let _turn = capture();
    let (mut sim, addr) = world(Config::new(), patient());
    for _ in 0..3 {
        connect(&mut sim, addr);
    }
    sim.control()
        .reconfigure(|config| config.max_connections = 2)
        .expect("changed");
    sim.settle();
    assert!(loud_text().starts_with("WARN server: "));
    sim.control()
        .reconfigure(|config| config.max_connections = 10)
        .expect("changed");
    sim.advance(Duration::from_secs(61));
    assert!(loud_text().starts_with("INFO server: "));
}

/// An address that cannot be reached: one warning, however many connections try it how often.
#[test]
fn a_backend_that_is_gone_has_one_warning_and_one_end() {
    use portcullis::sim::Answer;
    use portcullis::{Connect, Retry};
    let _turn = capture();
    let (mut sim, _) = world(Config::new(), listen());
    let [gone, silent] = ["192.0.2.7:80", "192.0.2.8:80"]
        .map(|addr| addr.parse::<SocketAddr>().expect("an address"));
    sim.remote(gone, Answer::Refuse);
    sim.remote(silent, Answer::Silence);
    for _ in 0..20 {
        let connect = Connect::new(Framing::Packet2)
            .with(|connect| connect.retry = Some(Retry::new(u32::MAX)));
        sim.control().connect(gone, connect, Echo).expect("begun");
    }
    sim.advance(20 * MINUTE);
    let begun = loud_text();
    assert_eq!(begun.lines().count(), 1, "{begun}");
    assert!(begun.starts_with("WARN connection: cannot connect to 192.0.2.7:80: "));
    // Another address has an episode of its own.
    sim.control()
        .connect(silent, Connect::new(Framing::Packet2), Echo)
        .expect("begun");
    sim.advance(MINUTE / 2);
    let other = loud_text();
    assert!(
        other.starts_with("WARN connection: cannot connect to 192.0.2.8:80: "),
        "{other}"
    );
    assert_eq!(other.lines().count(), 1, "{other}");
    sim.remote(gone, Answer::Accept);
    sim.advance(20 * MINUTE);
    let over = loud_text();
    assert_eq!(over.lines().count(), 2, "{over}");
    assert!(over
        .lines()
        .all(|line| line.starts_with("INFO connection: no connect to ")));
}

/// The servers of [`portcullis::Shards`] share the cap, and one of them warns.
#[test]
fn a_cap_that_is_shared_is_reported_once() {
    use kit::net::{connect, eventually, ping, tcp, Echo};
    let _turn = capture();
    let shards = portcullis::Shards::new(Config::max_connections(4))
        .threads(3)
        .spawn(|_, server: &mut portcullis::Server| {
            let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
            server.listen(listen, |_: &mut (), _| Echo).map(drop)
        })
        .expect("spawned");
    let addr = tcp(&shards.listeners[0].addr);
    let mut clients: Vec<_> = (0..4).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"hello");
    }
    let warnings = || {
        let lines = MEMORY.lines();
        lines
            .iter()
            .filter(|line| line.level == Level::Warn)
            .count()
    };
    eventually("it is reported", || warnings() > 0);
    for _ in 0..10 {
        for client in &mut clients {
            ping(client, b"again");
        }
    }
    assert_eq!(warnings(), 1);
    drop(clients);
    let _ = shards.handle.drain(Duration::from_secs(5));
    let _ = shards.join();
}

/// A shard whose poll fails is reported at once and closed, and the others go on.
#[test]
fn a_shard_that_fails_is_logged() {
    let _turn = capture();
    let build = |shard, server: &mut portcullis::Server| {
        let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
        server.listen(listen, |_: &mut (), _| Echo)?;
        if shard == 1 {
            let null = std::fs::File::open("/dev/null").map_err(portcullis::Error::other)?;
            let poll = std::os::fd::AsFd::as_fd(server);
            let poll = std::os::fd::AsRawFd::as_raw_fd(&poll);
            // The poll's descriptor is no poll any more.
            // SAFETY: both descriptors are open, and the server owns the second one still.
            unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&null), poll) };
        }
        Ok(())
    };
    let shards = portcullis::Shards::new(Config::new())
        .threads(2)
        .spawn(build)
        .expect("shards");
    let failed = shards.handle.shards().nth(1).expect("a shard");
    kit::net::eventually("it has gone", || failed.stop().is_err());
    let mut client = kit::net::connect(kit::net::tcp(&shards.listeners[0].addr));
    kit::net::ping(&mut client, b"the other one goes on");
    kit::net::eventually("it is reported", || {
        let lines = MEMORY.lines();
        let mut errors = lines.iter().filter(|line| line.level == Level::Error);
        errors.any(|line| line.text.starts_with("shard 1 has failed and is closed: "))
    });
    assert_eq!(kit::net::current_stats(&shards.handle).open, 1);
    drop(client);
    shards
        .handle
        .drain(Duration::from_secs(10))
        .expect("one runs");
    kit::net::eventually("the shards end", || shards.is_finished());
    shards.join().expect_err("the failure");
}

/// The names of the fields are a stable interface.
#[cfg(feature = "kv")]
#[test]
fn records_about_a_connection_have_fields() {
    let _turn = capture();
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet4).name("games");
    let (mut sim, addr) = world(Config::max_connections(1), listen);
    let client = connect(&mut sim, addr);
    let peer = sim.client_addr(client).expect("it has one").to_string();
    let id = sim.control().connections()[0].id;
    let of_reason = |reason: &str| {
        let lines = taken();
        let fields = lines.into_iter().map(|line| line.fields);
        let has_reason = |fields: &Vec<(String, String)>| {
            fields
                .iter()
                .any(|(key, value)| (&**key, &**value) == ("reason", reason))
        };
        fields.filter(has_reason).collect::<Vec<_>>()
    };
    let field = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let expected = |reason: &str| {
        vec![
            field("conn", &id.to_string()),
            field("listener", "games"),
            field("peer", &peer),
            field("reason", reason),
        ]
    };
    assert!(sim.control().kill(id));
    sim.settle();
    // The warning, and the end.
    assert_eq!(
        of_reason("killed"),
        [expected("killed"), expected("killed")]
    );

    let refuses = |listen: &mut Listen| listen.access_rules = AccessRules::deny_all();
    let changed = sim.control().reconfigure_listener("games", refuses);
    changed.expect("a change");
    let denied = connect(&mut sim, addr);
    let peer = sim.client_addr(denied).expect("it has one").to_string();
    let without_slot = [
        field("listener", "games"),
        field("peer", &peer),
        field("reason", "denied"),
    ];
    assert_eq!(of_reason("denied"), [without_slot]);
}

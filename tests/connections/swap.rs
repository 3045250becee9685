//! The protocol of an open connection may change: another handler, another framing, with what the old one knew. No byte is
//! lost or cut wrongly, and one handler hears of the end.

use std::net::SocketAddr;
use std::time::Duration;

use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{
    Close, CloseReason, Closed, Config, ConnId, Context, Framing, Handler, Listen, Message, Outcome,
};

/// What all handlers say, in order.
type Told = Vec<String>;

/// Lines. "login NAME" makes it a [`Session`]; what else it can do is in `on_frame`.
struct Login {
    lines: u32,
}

/// Packets, on behalf of a user.
struct Session {
    user: String,
    lines: u32,
}

impl Drop for Login {
    fn drop(&mut self) {
        DROPPED.with(|dropped| dropped.set(dropped.get() + 1));
    }
}

thread_local! {
    static DROPPED: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

fn session(user: &str, lines: u32) -> Session {
    let user = user.to_owned();
    Session { user, lines }
}

impl Login {
    fn swap(&self, cx: &mut Context<'_, Told>, user: &str) -> Outcome {
        // In the framing that the client still speaks.
        cx.conn.send(format!("welcome {user}\n"))?;
        cx.conn.set_framing(&Framing::Packet2);
        cx.conn.replace_handler(session(user, self.lines));
        // In the one that it speaks from now on.
        cx.conn.send("begin")?;
        Ok(())
    }
}

impl Handler<Told> for Login {
    fn on_open(&mut self, cx: &mut Context<'_, Told>) -> Outcome {
        cx.app.push("login: open".to_owned());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Told>, line: &[u8]) -> Outcome {
        self.lines += 1;
        let line = std::str::from_utf8(line)?.trim_end();
        cx.app.push(format!("login: {line}"));
        match line.split_once(' ').unwrap_or((line, "")) {
            ("login", user) => self.swap(cx, user)?,
            ("twice", user) => {
                cx.conn.replace_handler(session("nobody", 0));
                self.swap(cx, user)?;
            }
            ("and-close", user) => {
                self.swap(cx, user)?;
                return Err(Close::new());
            }
            ("and-fail", user) => {
                self.swap(cx, user)?;
                return Err(Close::because("changed its mind"));
            }
            ("and-panic", user) => {
                self.swap(cx, user)?;
                std::panic::resume_unwind(Box::new("planned"));
            }
            ("and-pause", user) => {
                cx.conn.set_timer(7, Duration::from_secs(5));
                cx.conn.pause();
                self.swap(cx, user)?;
            }
            ("raw", user) => {
                cx.conn.set_framing(&Framing::Raw);
                cx.conn.replace_handler(session(user, self.lines));
            }
            ("large", user) => {
                self.swap(cx, user)?;
                cx.conn.reconfigure(|conn| conn.max_frame = Some(10))?;
            }
            _ => {}
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Told>, closed: &Closed) {
        cx.app.push(format!("login: {}", closed.reason));
    }
}

impl Handler<Told> for Session {
    fn on_open(&mut self, cx: &mut Context<'_, Told>) -> Outcome {
        cx.app.push("session: open".to_owned());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Told>, frame: &[u8]) -> Outcome {
        let words = String::from_utf8_lossy(frame);
        cx.app
            .push(format!("{} after {}: {words}", self.user, self.lines));
        if frame == b"logout" {
            cx.conn.set_framing(&Framing::Line);
            cx.conn.replace_handler(Login { lines: 0 });
        }
        Ok(())
    }

    fn on_finish(&mut self, cx: &mut Context<'_, Told>) -> Outcome {
        cx.app.push(format!("{}: finish", self.user));
        cx.conn.close_after_input();
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_, Told>, key: u8) -> Outcome {
        cx.app.push(format!("{}: timer {key}", self.user));
        cx.conn.resume();
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, Told>, message: Message) -> Outcome {
        let text = message.downcast::<&str>().map_or("?", |text| *text);
        cx.app.push(format!("{}: told {text}", self.user));
        Ok(())
    }

    fn on_drain(&mut self, cx: &mut Context<'_, Told>) -> Outcome {
        cx.app.push(format!("{}: drain", self.user));
        cx.conn.close_after_input();
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Told>, closed: &Closed) {
        cx.app.push(format!("{}: {}", self.user, closed.reason));
    }
}

fn packet(payload: &str) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("short");
    [&length.to_be_bytes()[..], payload.as_bytes()].concat()
}

fn world() -> (Sim<Told>, SocketAddr) {
    DROPPED.with(|dropped| dropped.set(0));
    let mut sim = Sim::new(1, Config::new(), Told::new());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    let addr = sim.listen(listen, |_: &mut Told, _| Login { lines: 0 });
    (sim, addr.expect("listen"))
}

/// A client that has sent all of this, in one segment; what handlers said of it.
fn say(sim: &mut Sim<Told>, addr: SocketAddr, wire: &[u8]) -> ClientId {
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, wire);
    sim.settle();
    client
}

fn told(sim: &mut Sim<Told>) -> Told {
    std::mem::take(sim.app_mut())
}

fn id(sim: &mut Sim<Told>) -> ConnId {
    sim.control().connections()[0].id
}

fn dropped() -> u32 {
    DROPPED.with(std::cell::Cell::get)
}

/// The first bytes of the new protocol stand in the same segment as the last line of the old one, or anywhere behind it.
#[test]
fn nothing_is_lost_between_two_protocols_in_every_cut() {
    let wire = [
        &b"hello\nlogin ada\n"[..],
        &packet("one\ntwo"),
        &packet(""),
        &packet("logout"),
        b"again\nlogin bob\n",
        &packet("three"),
    ]
    .concat();
    let expected = [
        "login: open",
        "login: hello",
        "login: login ada",
        "ada after 2: one\ntwo",
        "ada after 2: ",
        "ada after 2: logout",
        "login: again",
        "login: login bob",
        "bob after 2: three",
    ];
    for cut in 0..=wire.len() {
        let (mut sim, addr) = world();
        let client = say(&mut sim, addr, &wire[..cut]);
        sim.send(client, &wire[cut..]);
        sim.settle();
        assert_eq!(told(&mut sim), expected, "cut at {cut}");
        let answers = [
            &b"welcome ada\n"[..],
            &packet("begin"),
            b"welcome bob\n",
            &packet("begin"),
        ]
        .concat();
        assert_eq!(
            sim.received(client),
            answers,
            "each answer is in its own framing"
        );
    }
    // A byte at a time.
    let (mut sim, addr) = world();
    let client = sim.connect(addr).expect("it listens");
    for byte in &wire {
        sim.send(client, &[*byte]);
        sim.settle();
    }
    assert_eq!(told(&mut sim), expected);
}

/// Exactly one `on_close`, for the handler that is there at the end; the other is dropped, once, without a word.
#[test]
fn the_last_handler_hears_of_the_end_and_it_alone() {
    type End = fn(&mut Sim<Told>, ClientId);
    let ends: [(&str, End, &[&str]); 5] = [
        (
            "FIN",
            |sim, client| sim.finish(client),
            &["ada: finish", "ada: peer finished"],
        ),
        (
            "RST",
            |sim, client| sim.reset(client),
            &["ada: reset by peer"],
        ),
        (
            "kill",
            |sim, _| assert!(sim.handle().kill(id(sim)).is_ok()),
            &["ada: killed"],
        ),
        (
            "drain",
            |sim, _| sim.control().drain(Duration::from_secs(1)),
            &["ada: drain", "ada: drained"],
        ),
        (
            "silence",
            |sim, _| sim.advance(Duration::from_secs(121)),
            &["ada: idle timeout"],
        ),
    ];
    for (name, end, expected) in ends {
        let (mut sim, addr) = world();
        let client = say(&mut sim, addr, b"login ada\n");
        assert_eq!(
            told(&mut sim),
            ["login: open", "login: login ada"],
            "no second on_open"
        );
        assert_eq!(dropped(), 1, "{name}: the old one is gone at once");
        end(&mut sim, client);
        sim.advance(Duration::from_secs(3));
        assert_eq!(told(&mut sim), expected, "{name}");
        assert_eq!((dropped(), sim.stats().open), (1, 0), "{name}");
    }
}

/// The callback that replaces also ends the connection: the successor is there already, and is the one that is told.
#[test]
fn a_swap_and_an_end_in_the_same_callback() {
    for (line, reason) in [
        ("and-close ada\n", CloseReason::Closed),
        ("and-fail ada\n", CloseReason::Failed),
        ("and-panic ada\n", CloseReason::Panicked),
    ] {
        let (mut sim, addr) = world();
        let client = say(
            &mut sim,
            addr,
            &[line.as_bytes(), &packet("not delivered")].concat(),
        );
        sim.finish(client);
        sim.advance(Duration::from_secs(3));
        let expected = [
            "login: open".to_owned(),
            format!("login: {}", line.trim_end()),
            format!("ada: {reason}"),
        ];
        assert_eq!(told(&mut sim), expected);
        assert_eq!((sim.stats().closed(reason), dropped()), (1, 1));
        // What was sent before is delivered, in both framings.
        let goodbye = [&b"welcome ada\n"[..], &packet("begin")].concat();
        assert_eq!(sim.received(client), goodbye, "{line}");
    }
}

#[test]
fn of_two_successors_the_last_one_stays() {
    let (mut sim, addr) = world();
    let client = say(
        &mut sim,
        addr,
        &[&b"twice ada\n"[..], &packet("who?")].concat(),
    );
    sim.finish(client);
    sim.advance(Duration::from_secs(3));
    let expected = [
        "login: open",
        "login: twice ada",
        "ada after 1: who?",
        "ada: finish",
        "ada: peer finished",
    ];
    assert_eq!(told(&mut sim), expected, "nobody hears of the other");
}

/// Timers and a pause belong to the connection, and so does a message that was on its way.
#[test]
fn timers_pauses_and_messages_reach_the_successor() {
    let (mut sim, addr) = world();
    let client = say(&mut sim, addr, b"");
    let id = id(&mut sim);
    sim.handle().notify(id, "early").expect("live");
    sim.settle();
    sim.send(
        client,
        &[&b"and-pause ada\n"[..], &packet("held back")].concat(),
    );
    sim.settle();
    sim.handle().notify(id, "late").expect("live");
    sim.advance(Duration::from_secs(4));
    // The login ignores messages: the default.
    assert_eq!(
        told(&mut sim),
        ["login: open", "login: and-pause ada", "ada: told late"]
    );
    sim.advance(Duration::from_secs(2));
    assert_eq!(told(&mut sim), ["ada: timer 7", "ada after 1: held back"]);
}

/// The end of the peer stands right behind the last line: it is the successor's.
#[test]
fn a_peer_that_finishes_with_its_last_line() {
    for (wire, expected) in [
        (
            b"login ada\n".to_vec(),
            &["login: login ada", "ada: finish", "ada: peer finished"][..],
        ),
        (
            [&b"login ada\n"[..], &packet("bye")].concat(),
            &[
                "login: login ada",
                "ada after 1: bye",
                "ada: finish",
                "ada: peer finished",
            ],
        ),
        // Inside a frame of the new protocol.
        (
            b"login ada\n\0".to_vec(),
            &["login: login ada", "ada: truncated frame"],
        ),
        // The rest of a raw connection is no frame that could be incomplete.
        (
            b"raw ada\n\0".to_vec(),
            &[
                "login: raw ada",
                "ada after 1: \0",
                "ada: finish",
                "ada: peer finished",
            ],
        ),
    ] {
        let (mut sim, addr) = world();
        let client = sim.connect(addr).expect("it listens");
        sim.send(client, &wire);
        sim.finish(client);
        sim.advance(Duration::from_secs(3));
        assert_eq!(told(&mut sim)[1..], *expected);
    }
}

/// The maximum goes with the framing: that of lines does not judge packets, and one that is set holds for what has come.
#[test]
fn the_longest_frame_is_the_new_framings() {
    let (mut sim, addr) = world();
    let long = "x".repeat(65_535);
    say(
        &mut sim,
        addr,
        &[&b"login ada\n"[..], &packet(&long)].concat(),
    );
    assert_eq!(told(&mut sim).last(), Some(&format!("ada after 1: {long}")));
    let (mut sim, addr) = world();
    let client = say(
        &mut sim,
        addr,
        &[&b"large ada\n"[..], &packet("0123456789")].concat(),
    );
    assert_eq!(
        told(&mut sim).last().map(String::as_str),
        Some("ada after 1: 0123456789")
    );
    sim.send(client, &packet("0123456789a"));
    sim.advance(Duration::from_secs(3));
    assert_eq!(told(&mut sim), ["ada: frame too large"]);
}

/// From outside a callback too: between two turns, and by another connection's handler.
#[test]
fn another_connection_may_swap_it() {
    let (mut sim, addr) = world();
    let client = say(&mut sim, addr, b"half a li");
    let id = id(&mut sim);
    let mut control = sim.control();
    let mut conn = control.conn(id).expect("live");
    conn.set_framing(&Framing::Delimited(b'!'));
    conn.replace_handler(session("eve", 9));
    sim.settle();
    // Received bytes that are no frame yet go to the new handler, in the new framing.
    sim.send(client, b"ne!");
    sim.settle();
    assert_eq!(told(&mut sim), ["login: open", "eve after 9: half a line!"]);
    assert_eq!(dropped(), 1);
    assert_eq!(sim.state(client), ClientState::Connected);
}

//! A handler gives another on the same thread a message: any type, in order, and before a close that comes later.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use portcullis::sim::{Answer, Call, ClientId, ClientState, Faults, Sim};
use portcullis::{
    Close, CloseReason, Closed, Config, ConnId, Context, Framing, HandleError, Handler, Listen,
    Message, Outcome, Peer, SendError,
};

/// Not `Send`.
struct Note(Rc<str>);

/// What all handlers have seen, in order, and the connections in the order in which they opened.
#[derive(Default)]
struct Club {
    seen: Vec<String>,
    members: Vec<ConnId>,
}

/// Lines are commands; the word that they begin with is in `on_frame`.
struct Member;

impl Member {
    fn number(cx: &Context<'_, Club>) -> usize {
        let own = cx.conn.id();
        let place = cx.app.members.iter().position(|&id| id == own);
        place.expect("it has opened")
    }
}

fn notify(cx: &mut Context<'_, Club>, to: usize, text: &str) -> Result<(), HandleError> {
    let id = cx.app.members[to];
    let note = Note(text.into());
    match cx.conn.peer(id) {
        Some(mut peer) => peer.notify(note),
        None => Err(HandleError::NoConnection(id)),
    }
}

impl Handler<Club> for Member {
    fn on_open(&mut self, cx: &mut Context<'_, Club>) -> Outcome {
        cx.app.members.push(cx.conn.id());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Club>, line: &[u8]) -> Outcome {
        let line = std::str::from_utf8(line)?.trim_end().to_owned();
        let number = Self::number(cx);
        cx.app.seen.push(format!("{number} line {line}"));
        let other = 1 - number;
        match line.as_str() {
            "notify" => {
                for text in ["one", "two", "three"] {
                    notify(cx, other, text)?;
                }
            }
            "large" => cx.conn.send([b'x'; 40_000])?,
            "leave" => {
                notify(cx, number, "last words")?;
                cx.conn.close();
            }
            "resume" => {
                notify(cx, other, "resume")?;
                notify(cx, other, "last words")?;
                let id = cx.app.members[other];
                cx.conn.peer(id).expect("open").close();
            }
            "close" | "twice" | "end" | "abort" | "input" => {
                notify(cx, other, "last words")?;
                let id = cx.app.members[other];
                let mut peer = cx.conn.peer(id).expect("open");
                match line.as_str() {
                    "end" => peer.end(Close::because("not wanted")),
                    "abort" => peer.abort(),
                    "input" => peer.close_after_input(),
                    _ => peer.close(),
                }
                if line == "twice" {
                    peer.end(Close::because("again"));
                    peer.close();
                }
                let late = notify(cx, other, "too late");
                let mut peer = cx.conn.peer(id).expect("open");
                let sent = peer.send("too late as well\n");
                if line != "input" {
                    assert_eq!(late, Err(HandleError::NoConnection(id)));
                    assert!(matches!(sent, Err(SendError::Closed)), "{sent:?}");
                }
            }
            "fail" => {
                notify(cx, number, "from myself")?;
                return Err(Close::because("planned"));
            }
            "panic" => {
                notify(cx, number, "never")?;
                std::panic::resume_unwind(Box::new("planned"));
            }
            _ => {}
        }
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, Club>, message: Message) -> Outcome {
        let note = message.downcast::<Note>().expect("a note");
        let seen = format!("{} note {}", Self::number(cx), note.0);
        cx.app.seen.push(seen);
        cx.conn.send(format!("{}\n", note.0))?;
        if &*note.0 == "bye" {
            cx.conn.close();
            let late = cx.conn.send("after the close\n");
            assert!(matches!(late, Err(SendError::Closed)), "{late:?}");
        }
        if &*note.0 == "resume" {
            cx.conn.resume();
        }
        if &*note.0 == "ping" {
            // For ever, from one to the other.
            let other = 1 - Self::number(cx);
            notify(cx, other, "ping")?;
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Club>, closed: &Closed) {
        let seen = format!("{} {}", Self::number(cx), closed.reason);
        cx.app.seen.push(seen);
    }
}

/// Until every closed connection has lingered.
fn linger(sim: &mut Sim<Club>) {
    sim.advance(Duration::from_secs(60));
}

fn club(config: Config) -> (Sim<Club>, ClientId, ClientId) {
    let mut sim = Sim::new(1, config, Club::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    let addr = sim.listen(listen, |_: &mut Club, _| Member);
    let addr = addr.expect("a listener");
    let one = sim.connect(addr).expect("room");
    sim.settle();
    let other = sim.connect(addr).expect("room");
    sim.settle();
    assert_eq!(sim.app().members.len(), 2);
    (sim, one, other)
}

#[test]
fn messages_arrive_in_order_after_the_callback() {
    let (mut sim, one, other) = club(Config::new());
    sim.send(one, b"notify\n");
    sim.settle();
    let seen = ["0 line notify", "1 note one", "1 note two", "1 note three"];
    assert_eq!(sim.app().seen, seen);
    assert_eq!(sim.received(other), b"one\ntwo\nthree\n");
    assert_eq!(sim.received(one), b"");
    assert_eq!(sim.stats().undeliverable, 0);
}

/// Passes each message on to the first connection, which keeps them.
struct Relay;

#[derive(Default)]
struct Relayed {
    first: Option<ConnId>,
    notes: Vec<Note>,
}

impl Handler<Relayed> for Relay {
    fn on_open(&mut self, cx: &mut Context<'_, Relayed>) -> Outcome {
        cx.app.first.get_or_insert(cx.conn.id());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Relayed>, line: &[u8]) -> Outcome {
        let note = Note(String::from_utf8_lossy(line.trim_ascii_end()).into());
        cx.conn.notify(note)?;
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, Relayed>, message: Message) -> Outcome {
        match cx.app.first {
            Some(first) if first != cx.conn.id() => {
                let mut first = cx.conn.peer(first).expect("open");
                first.notify(message)?;
            }
            _ => cx.app.notes.push(*message.downcast().expect("a note")),
        }
        Ok(())
    }
}

/// It is not put into another box.
#[test]
fn a_message_that_is_passed_on_arrives_as_it_was() {
    let mut sim = Sim::new(1, Config::new(), Relayed::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    let addr = sim.listen(listen, |_: &mut Relayed, _| Relay);
    let addr = addr.expect("a listener");
    let clients = [0; 2].map(|_| {
        let client = sim.connect(addr).expect("room");
        sim.settle();
        client
    });
    sim.send(clients[1], b"hello\n");
    sim.settle();
    let notes: Vec<_> = sim.app().notes.iter().map(|note| &*note.0).collect();
    assert_eq!(notes, ["hello"]);
    assert_eq!(sim.stats().panics, 0);
}

#[test]
fn a_close_comes_behind_the_messages_before_it() {
    for (command, reason) in [
        ("close", CloseReason::Closed),
        ("twice", CloseReason::Closed),
        ("end", CloseReason::Failed),
    ] {
        let (mut sim, one, other) = club(Config::new());
        // Its own line is not delivered any more: the close was asked for before.
        sim.send(one, format!("{command}\n").as_bytes());
        sim.send(other, b"hello\n");
        linger(&mut sim);
        let asked = format!("0 line {command}");
        let seen = [&asked, "1 note last words", &format!("1 {reason}")];
        assert_eq!(sim.app().seen, seen);
        assert_eq!(sim.received(other), b"last words\n");
        assert_eq!(sim.state(other), ClientState::Finished);
        let stats = sim.stats();
        assert_eq!((stats.closed(reason), stats.undeliverable), (1, 0));
    }
}

/// Nor after a pause that the handler ends meanwhile, with an iteration between two messages.
#[test]
fn a_resume_before_a_close_delivers_no_frame() {
    let (mut sim, one, other) = club(Config::new().with(|config| config.budgets.commands = 1));
    sim.send(one, b"resume\n");
    sim.send(other, b"hello\n");
    linger(&mut sim);
    let seen = [
        "0 line resume",
        "1 note resume",
        "1 note last words",
        "1 closed by handler",
    ];
    assert_eq!(sim.app().seen, seen);
    assert_eq!(sim.received(other), b"resume\nlast words\n");
}

/// Nor where nothing can be sent any more, so that a pause has no effect.
#[test]
fn a_close_without_a_reader_delivers_no_frame() {
    let (mut sim, _, other) = club(Config::new());
    sim.set_faults(Faults::none().with(Call::Write, 0, libc::EPIPE));
    sim.send(other, b"large\nleave\nlate\n");
    linger(&mut sim);
    let seen = ["1 line large", "1 line leave", "1 note last words"];
    assert_eq!(sim.app().seen[..3], seen);
    assert_eq!(sim.app().seen.len(), 4, "{:?}", sim.app().seen);
}

#[test]
fn a_close_after_input_waits_for_messages_from_later_too() {
    let (mut sim, one, other) = club(Config::new());
    sim.send(one, b"input\n");
    linger(&mut sim);
    assert_eq!(
        sim.received(other),
        b"too late as well\nlast words\ntoo late\n"
    );
    assert_eq!(sim.stats().closed(CloseReason::Closed), 1);
}

/// A peer that finishes in the same moment keeps no message from its connection.
#[test]
fn the_end_of_the_peer_waits_for_messages() {
    let (mut sim, one, other) = club(Config::new());
    sim.send(one, b"notify\n");
    sim.finish(other);
    sim.settle();
    assert_eq!(sim.received(other), b"one\ntwo\nthree\n");
    assert_eq!(sim.stats().closed(CloseReason::Finished), 1);
    assert_eq!(sim.stats().undeliverable, 0);
}

#[test]
fn a_callback_s_own_end_comes_behind_them_as_well() {
    let (mut sim, one, _) = club(Config::new());
    sim.send(one, b"fail\nmore\n");
    linger(&mut sim);
    let seen = ["0 line fail", "0 note from myself", "0 handler failed"];
    assert_eq!(sim.app().seen, seen);
    assert_eq!(sim.received(one), b"from myself\n");
}

/// The handler of a message closes while another waits: that one may be answered, but nothing else is sent.
#[test]
fn a_close_between_two_messages_comes_behind_both() {
    let (mut sim, one, _) = club(Config::new());
    let id = sim.app().members[0];
    let mut control = sim.control();
    let mut conn = control.conn(id).expect("open");
    for text in ["bye", "and this"] {
        conn.notify(Note(text.into())).expect("it is open");
    }
    linger(&mut sim);
    assert_eq!(sim.received(one), b"bye\nand this\n");
    assert_eq!(
        sim.app().seen,
        ["0 note bye", "0 note and this", "0 closed by handler"]
    );
}

#[test]
fn an_abort_and_a_panic_come_first() {
    for (command, number, reason) in [
        ("abort", 1, CloseReason::Aborted),
        ("panic", 0, CloseReason::Panicked),
    ] {
        let (mut sim, one, _) = club(Config::new());
        sim.send(one, format!("{command}\n").as_bytes());
        linger(&mut sim);
        let asked = format!("0 line {command}");
        assert_eq!(sim.app().seen, [asked, format!("{number} {reason}")]);
        assert_eq!(sim.stats().undeliverable, 1);
    }
}

#[test]
fn a_message_waits_until_a_connection_is_open() {
    let (mut sim, one, _) = club(Config::new());
    let id = sim.app().members[0];
    let seen = Rc::new(RefCell::new(Vec::new()));
    struct Asks(Rc<RefCell<Vec<&'static str>>>);
    impl Handler<Club> for Asks {
        fn on_open(&mut self, _: &mut Context<'_, Club>) -> Outcome {
            self.0.borrow_mut().push("open");
            Ok(())
        }
        fn on_frame(&mut self, _: &mut Context<'_, Club>, _: &[u8]) -> Outcome {
            Ok(())
        }
        fn on_message(&mut self, _: &mut Context<'_, Club>, message: Message) -> Outcome {
            let text = message.downcast::<&str>().expect("a text");
            self.0.borrow_mut().push(*text);
            Ok(())
        }
    }
    let remote = "10.0.0.7:25";
    sim.remote(remote, Answer::Accept);
    let options = portcullis::Connect::new(Framing::Line);
    let asks = Asks(Rc::clone(&seen));
    let asked = sim.control().connect(remote, options, asks);
    let asked = asked.expect("room");
    let mut control = sim.control();
    let mut conn = control.conn(asked).expect("there");
    conn.notify("first").expect("it waits");
    conn.notify("second").expect("it waits");
    sim.settle();
    assert_eq!(*seen.borrow(), ["open", "first", "second"]);
    // Outside of callbacks too.
    let mut control = sim.control();
    let mut conn = control.conn(id).expect("there");
    conn.notify(Note("hello".into())).expect("it is open");
    sim.settle();
    assert_eq!(sim.received(one), b"hello\n");
}

/// Two handlers that answer each other for ever keep no other client waiting, and no iteration long.
#[test]
fn an_endless_exchange_starves_nobody() {
    let (mut sim, one, other) = club(Config::new());
    let id = sim.app().members[0];
    let mut control = sim.control();
    let mut conn = control.conn(id).expect("there");
    conn.notify(Note("ping".into())).expect("it is open");
    sim.send(other, b"hello\n");
    for _ in 0..20 {
        sim.step();
    }
    assert!(sim.app().seen.contains(&"1 line hello".to_owned()));
    assert!(sim.received(one).len() > 20, "it goes on");
}

/// Counts its drops.
struct Counted(Rc<Cell<u32>>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
    }
}

#[test]
fn messages_are_bounded_and_none_is_leaked() {
    let config = Config::new().with(|config| config.queue_limits.commands = 3);
    let (mut sim, _, _) = club(config);
    let (id, dropped) = (sim.app().members[0], Rc::new(Cell::new(0)));
    let mut control = sim.control();
    let mut conn = control.conn(id).expect("there");
    for _ in 0..3 {
        conn.notify(Counted(Rc::clone(&dropped))).expect("room");
    }
    let full = conn.notify(Counted(Rc::clone(&dropped)));
    assert_eq!((full, dropped.get()), (Err(HandleError::QueueFull), 1));
    conn.abort();
    sim.settle();
    assert_eq!((dropped.get(), sim.stats().undeliverable), (4, 3));
}

/// Notifies itself for ever.
struct Restless;

impl Handler<Club> for Restless {
    fn on_open(&mut self, cx: &mut Context<'_, Club>) -> Outcome {
        cx.conn.notify("again")?;
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Club>, line: &[u8]) -> Outcome {
        cx.conn.send(line)?;
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, Club>, message: Message) -> Outcome {
        if let Ok(text) = message.downcast::<&str>() {
            cx.app.seen.push((*text).to_owned());
            if *text == "again" {
                cx.conn.notify("again")?;
            }
        }
        Ok(())
    }
}

/// A handler that notifies itself without end keeps no other message, no handle's command and no end waiting.
#[test]
fn a_handler_that_notifies_itself_starves_nobody() {
    let config = Config::new().with(|config| config.budgets.commands = 3);
    let mut sim = Sim::new(1, config, Club::default());
    let mut first = true;
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    let addr = sim.listen_with(
        listen,
        Box::new(move |_: &mut Club, _: Peer| -> Box<dyn Handler<Club>> {
            match std::mem::take(&mut first) {
                true => Box::new(Restless),
                false => Box::new(Member),
            }
        }),
    );
    let addr = addr.expect("a listener");
    let _restless = sim.connect(addr).expect("room");
    sim.step();
    let other = sim.connect(addr).expect("room");
    for _ in 0..5 {
        sim.step();
    }
    let id = sim.app().members[0];
    let handle = sim.handle();
    let posted = handle.post(move |club: &mut Club, control| {
        club.seen.push("a job".to_owned());
        let mut conn = control.conn(id).expect("open");
        conn.notify(Note("to the other".into())).expect("room");
    });
    posted.expect("room");
    for _ in 0..3 {
        sim.step();
    }
    sim.finish(other);
    for _ in 0..10 {
        sim.step();
    }
    let seen = ["a job", "0 note to the other", "0 peer finished"];
    let all = sim.app().seen.iter().filter(|seen| *seen != "again");
    assert!(all.eq(seen), "{:?}", sim.app().seen);
    assert_eq!(sim.received(other), b"to the other\n");
}

/// An abort is not held up by a close that waits.
#[test]
fn an_abort_passes_a_close_that_waits() {
    let (mut sim, one, _) = club(Config::new());
    let id = sim.app().members[0];
    let mut control = sim.control();
    let mut conn = control.conn(id).expect("open");
    conn.notify(Note("never".into())).expect("it is open");
    conn.close();
    conn.end(Close::abort());
    sim.settle();
    assert_eq!(sim.state(one), ClientState::Reset);
    assert_eq!(sim.app().seen, ["0 aborted by handler"]);
}

/// A frame of a handle from before the close is sent.
#[test]
fn a_handle_s_frame_keeps_its_place_before_a_close() {
    let (mut sim, one, _) = club(Config::new());
    let (id, handle) = (sim.app().members[0], sim.handle());
    let posted = handle.post(move |_: &mut Club, control| {
        let mut conn = control.conn(id).expect("open");
        conn.notify(Note("a note".into())).expect("it is open");
    });
    posted.expect("room");
    handle.send(id, "a frame\n").expect("room");
    let posted = handle.post(move |_: &mut Club, control| {
        control.conn(id).expect("open").close();
    });
    posted.expect("room");
    linger(&mut sim);
    assert_eq!(sim.received(one), b"a note\na frame\n");
    assert_eq!(sim.stats().undeliverable, 0);
}

/// A frame from behind the close changes nothing of it.
#[test]
fn a_handle_s_frame_behind_a_close_is_undeliverable() {
    let (mut sim, one, _) = club(Config::new());
    let (id, handle) = (sim.app().members[0], sim.handle());
    let posted = handle.post(move |_: &mut Club, control| {
        let mut conn = control.conn(id).expect("open");
        conn.notify(Note("a note".into())).expect("it is open");
        conn.close();
    });
    posted.expect("room");
    handle.send(id, "late\n").expect("the handle does not know");
    let posted = handle.post(move |_: &mut Club, control| {
        let mut conn = control.conn(id).expect("open");
        let sent = conn.send("late\n");
        assert!(matches!(sent, Err(SendError::Closed)), "{sent:?}");
        let late = conn.notify(Note("late".into()));
        assert_eq!(late, Err(HandleError::NoConnection(id)));
    });
    posted.expect("room");
    linger(&mut sim);
    assert_eq!(sim.received(one), b"a note\n");
    assert_eq!((sim.stats().undeliverable, sim.stats().panics), (1, 0));
}

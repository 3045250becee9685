//! What a handler does wrong hurts its own connection alone, and whatever it does from wherever, the loop goes on.

use std::error::Error;
use std::fmt;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::panic::panic_any;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use kit::net::{
    await_end, connect, eventually, hold, local, packet2, ping, read_to_end, recv2, send2, spawn,
    Echo, ReadSome, Running,
};
use kit::script::{
    connect_narrow, spawn_script, try_connect_narrow, usual, Call, Entry, Journal, ScriptedHandler,
};
use log::{Level, Log, Metadata, Record};
use portcullis::{
    Close, CloseReason, Config, ConnId, Context, Decoded, FrameBuf, FrameError, Framer, Framing,
    HandleError, Handler, Outcome, SendError, Server,
};

/// Everything that any test's server has logged.
struct Collector(Mutex<Vec<(Level, String)>>);

static COLLECTOR: Collector = Collector(Mutex::new(Vec::new()));
static INSTALL: Once = Once::new();

impl Log for Collector {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = (record.level(), record.args().to_string());
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(line);
    }

    fn flush(&self) {}
}

fn collect_logs() {
    INSTALL.call_once(|| {
        log::set_logger(&COLLECTOR).expect("the only logger");
        log::set_max_level(log::LevelFilter::Debug);
    });
}

/// Waits for an error line with `words`, which each test chooses for itself.
#[track_caller]
fn await_error(words: &str) {
    await_line(Level::Error, words);
}

/// Waits for a line of this level with `words`.
#[track_caller]
fn await_line(wanted: Level, words: &str) {
    eventually(&format!("a line at {wanted} with {words:?}"), || {
        let lines = COLLECTOR.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines
            .iter()
            .any(|(level, line)| *level == wanted && line.contains(words))
    });
}

/// Panics when it is dropped.
#[derive(Debug)]
struct Bomb(&'static str);

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("{}", self.0);
    }
}

impl fmt::Display for Bomb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Error for Bomb {}

/// The callbacks that an open connection can get, one by one.
const CALLBACKS: [Entry; 8] = [
    Entry::Open,
    Entry::Frame,
    Entry::Finish,
    Entry::Writable,
    Entry::Flushed,
    Entry::Timer(1),
    Entry::Message,
    Entry::Drain,
];

fn entry(call: &Call<'_>) -> Entry {
    match call {
        Call::Close(_) => Entry::Close(CloseReason::Closed, None),
        call => call.entry(),
    }
}

/// Connects a client whose handler will get the call `wanted` sooner or later. None, if it was
/// reset before `connect` returned.
fn provoke(server: &Running, wanted: &Entry) -> Option<TcpStream> {
    let before: Vec<ConnId> =
        server.ask(|(), control| control.connections().iter().map(|info| info.id).collect());
    if *wanted == Entry::Open {
        return try_connect_narrow(server.addr()).ok();
    }
    let mut client = connect_narrow(server.addr());
    match wanted {
        Entry::Frame => send2(&mut client, b"frame"),
        Entry::Finish => client.shutdown(Shutdown::Write).expect("FIN"),
        Entry::Writable => send2(&mut client, b"flood"),
        Entry::Flushed => send2(&mut client, b"flush"),
        Entry::Timer(_) => send2(&mut client, b"timer"),
        Entry::Message => {
            let mut id = None;
            eventually("it is in", || {
                let now = server.ask(|(), control| control.connections());
                id = now
                    .iter()
                    .map(|info| info.id)
                    .find(|id| !before.contains(id));
                id.is_some()
            });
            server
                .handle
                .notify(id.expect("in"), "message")
                .expect("alive");
        }
        Entry::Drain => server.handle.drain(Duration::from_secs(20)).expect("drain"),
        Entry::BadInput(_) => unreachable!("see `worlds`"),
        Entry::Close(..) => send2(&mut client, b"close"),
        Entry::Open | Entry::Secured | Entry::ConnectFailed(_) => {}
    }
    Some(client)
}

/// What the provoked connections do besides: they bring about their own timer and their own flood.
fn provoked(cx: &mut Context<'_>, call: Call<'_>) -> Outcome {
    match call {
        Call::Frame(b"timer") => cx.conn.set_timer(1, Duration::from_millis(1)),
        Call::Frame(b"flood") => {
            for _ in 0..10 {
                cx.conn.send([5; 50_000])?;
            }
        }
        Call::Frame(b"flush") => cx.conn.notify_flushed(),
        Call::Frame(b"close") => cx.conn.close(),
        call => return usual(cx, call),
    }
    Ok(())
}

/// Everything up to the end, whatever end it is.
fn hear(mut client: &TcpStream) -> Vec<u8> {
    let mut heard = Vec::new();
    let _ = client.read_to_end(&mut heard);
    heard
}

/// A panic in a callback ends that connection and frees its slot; the next turn works.
#[test]
fn a_panic_in_each_callback_ends_that_connection_alone() {
    collect_logs();
    let mut callbacks = CALLBACKS.to_vec();
    callbacks.push(Entry::Close(CloseReason::Closed, None));
    for wanted in callbacks {
        let words = format!("a panic in {wanted:?}");
        let (panicking, message) = (wanted.clone(), words.clone());
        // The first to connect is left alone.
        let mut armed = false;
        // Also a client that finishes at once gets its callbacks.
        let listen = local().with(|listen| {
            listen.evict_silent = false;
            listen.socket.send_buffer = Some(16 * 1024);
            listen.conn.low_watermark = 4 * 1024;
            listen.conn.high_watermark = 64 * 1024;
        });
        let first = Arc::new(Mutex::new(None));
        let (server, journal) = spawn_script(Config::new(), listen, move |cx, call| {
            let spared = *first.lock().expect("first").get_or_insert(cx.conn.id()) == cx.conn.id();
            armed |= entry(&call) == panicking && !spared;
            if std::mem::take(&mut armed) {
                panic!("{message}");
            }
            provoked(cx, call)
        });
        let mut bystander = connect(server.addr());
        ping(&mut bystander, b"before");
        let client = provoke(&server, &wanted).expect("no reset");
        hear(&client);
        drop(client);
        let drained = wanted == Entry::Drain;
        if drained {
            assert_eq!(read_to_end(&mut bystander), b"", "the drain goes on");
            drop(bystander);
        } else {
            server.until("its place is free", |stats| stats.open == 1);
            ping(&mut bystander, b"after");
            // Its place has another tenant.
            drop(provoke(&server, &Entry::Close(CloseReason::Closed, None)));
            server.until("its place is free again", |stats| stats.open == 1);
            ping(&mut bystander, b"after all");
            drop(bystander);
        }
        let reasons = journal.until_closed(1 + usize::from(drained));
        let expected = if matches!(wanted, Entry::Close(..)) {
            CloseReason::Closed
        } else {
            CloseReason::Panicked
        };
        assert!(reasons.contains(&expected), "{wanted:?}: {reasons:?}");
        await_error(&words);
        if !drained {
            server.finish();
        }
        journal.until_closed(2);
        journal.assert_whole_lives();
    }
}

/// What a panic says when it is not text, and what it does when it is dropped.
#[test]
fn a_panic_whose_payload_panics_is_one_panic() {
    collect_logs();
    let (server, journal) = spawn_script(Config::new(), local(), |cx, call| match call {
        Call::Frame(b"bomb") => panic_any(Bomb("the payload's drop")),
        call => usual(cx, call),
    });
    let mut bystander = connect(server.addr());
    ping(&mut bystander, b"before");
    let mut client = connect(server.addr());
    send2(&mut client, b"bomb");
    await_end(&mut client);
    drop(client);
    assert_eq!(journal.until_closed(1), [CloseReason::Panicked]);
    assert!(server
        .handle
        .post(|(), _| panic_any(Bomb("a job's payload")))
        .is_ok());
    ping(&mut bystander, b"after");
    server.until("the job is counted", |stats| stats.panics == 2);
}

#[test]
fn what_was_sent_before_a_panic_arrives() {
    let (server, journal) = spawn_script(Config::new(), local(), |cx, call| match call {
        Call::Frame(b"panic") => {
            cx.conn.send(b"last words")?;
            panic!("after a send")
        }
        call => usual(cx, call),
    });
    let mut client = connect(server.addr());
    client
        .write_all(&[packet2(b"one"), packet2(b"panic"), packet2(b"never")].concat())
        .expect("write");
    assert_eq!(
        read_to_end(&mut client),
        [packet2(b"one"), packet2(b"last words")].concat()
    );
    drop(client);
    assert_eq!(journal.until_closed(1), [CloseReason::Panicked]);
    assert_eq!(journal.count(&Entry::Frame), 2);
}

#[test]
fn a_service_that_panics_loses_one_client() {
    collect_logs();
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        let service = |count: &mut u32, _| {
            *count += 1;
            assert!(*count != 2, "the service's panic");
            Echo
        };
        server.listen(local(), service).expect("listen");
        (server, 0u32)
    });
    let mut first = connect(server.addr());
    ping(&mut first, b"first");
    await_end(&mut connect(server.addr()));
    let mut third = connect(server.addr());
    ping(&mut third, b"third");
    ping(&mut first, b"first again");
    let stats = server.until("it is counted", |stats| {
        stats.closed(CloseReason::Panicked) == 1
    });
    assert_eq!((stats.panics, stats.open, stats.opened), (1, 2, 2));
    await_error("the service's panic");
}

/// Echoes, and panics when it is dropped.
struct Fragile {
    _bomb: Bomb,
}

impl Handler for Fragile {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        match frame {
            b"replace" => cx.conn.replace_handler(Echo),
            b"panic" => panic!("before the drop"),
            _ => cx.conn.send(frame)?,
        }
        Ok(())
    }
}

#[test]
fn a_handler_whose_drop_panics() {
    collect_logs();
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        let service = |_: &mut (), _| Fragile {
            _bomb: Bomb("the handler's drop"),
        };
        server.listen(local(), service).expect("listen");
        (server, ())
    });
    let mut client = connect(server.addr());
    ping(&mut client, b"hello");
    drop(client);
    server.until("its drop is counted", |stats| {
        stats.panics == 1 && stats.open == 0
    });
    // Replaced while it runs.
    let mut client = connect(server.addr());
    send2(&mut client, b"replace");
    ping(&mut client, b"the new one");
    server.until("its drop is counted", |stats| stats.panics == 2);
    drop(client);
    // After a panic of its own.
    let mut client = connect(server.addr());
    send2(&mut client, b"panic");
    await_end(&mut client);
    drop(client);
    server.until("all have gone", |stats| {
        stats.open == 0 && stats.panics == 4
    });
    await_error("the handler's drop");
    let (stats, ()) = server.finish();
    assert_eq!(
        (
            stats.closed(CloseReason::Finished),
            stats.closed(CloseReason::Panicked)
        ),
        (2, 1)
    );
}

/// Lines, but some bytes make it panic.
struct Touchy;

impl Framer for Touchy {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        let Some(end) = input.iter().position(|byte| *byte == b'\n') else {
            return Ok(Decoded::More);
        };
        assert!(!input.starts_with(b"decode"), "the framer's decode");
        Ok(Decoded::Frame {
            payload: 0..end,
            consumed: end + 1,
        })
    }

    fn pack(&mut self, payload: &[&[u8]], out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        let payload = payload.concat();
        out.put(&payload);
        assert!(payload != b"encode", "the framer's encode");
        Ok(false)
    }

    fn trailer(&mut self, out: &mut FrameBuf<'_>) {
        out.put(b"\n");
    }
}

fn line(client: &mut TcpStream, words: &str) {
    client
        .write_all(format!("{words}\n").as_bytes())
        .expect("write");
    let mut echo = vec![0; words.len() + 1];
    client.read_exact(&mut echo).expect("the echo");
    assert_eq!(echo, format!("{words}\n").as_bytes());
}

#[test]
fn a_framer_that_panics_in_decode() {
    collect_logs();
    let listen = local().with(|listen| listen.framing = Framing::custom(|| Touchy));
    let (server, journal) = spawn_script(Config::new(), listen, usual);
    let mut bystander = connect(server.addr());
    line(&mut bystander, "before");
    let mut client = connect(server.addr());
    client.write_all(b"good\ndecode\nlost\n").expect("write");
    assert_eq!(hear(&client), b"good\n");
    drop(client);
    assert_eq!(journal.until_closed(1), [CloseReason::Panicked]);
    line(&mut bystander, "after");
    await_error("the framer's decode");
}

#[test]
fn a_framer_that_panics_in_encode() {
    collect_logs();
    let listen = local().with(|listen| listen.framing = Framing::custom(|| Touchy));
    let (server, journal) = spawn_script(Config::new(), listen, usual);
    let mut bystander = connect(server.addr());
    line(&mut bystander, "before");
    // Under a handler.
    let mut client = connect(server.addr());
    client.write_all(b"good\nencode\n").expect("write");
    assert_eq!(hear(&client), b"good\n", "nothing of the frame that failed");
    drop(client);
    assert_eq!(journal.until_closed(1), [CloseReason::Panicked]);
    // Under a handle, where no handler is to blame.
    let mut client = connect(server.addr());
    line(&mut client, "hello");
    let peer = client.local_addr().expect("addr");
    let id = id_of(&server, peer);
    server.handle.send(id, "encode").expect("queued");
    line(&mut bystander, "after");
    assert_eq!(hear(&client), b"");
    drop(client);
    assert_eq!(journal.until_closed(2), [CloseReason::Panicked; 2]);
    line(&mut bystander, "after all");
    await_error("the framer's encode");
}

#[test]
fn a_framer_that_panics_when_it_is_made_or_dropped() {
    struct Dropped {
        _bomb: Bomb,
    }
    impl Framer for Dropped {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
            let length = input.len();
            Ok(Decoded::Frame {
                payload: 0..length,
                consumed: length,
            })
        }
    }
    let made = Arc::new(Mutex::new(0));
    let framing = Framing::custom(move || {
        let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
        *made += 1;
        let number = *made;
        drop(made);
        assert!(number != 1, "the framer's making");
        Dropped {
            _bomb: Bomb("the framer's drop"),
        }
    });
    collect_logs();
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(
                local().with(|listen| listen.framing = framing),
                |_: &mut (), _| Echo,
            )
            .expect("listen");
        server
            .listen(local().name("plain"), |_: &mut (), _| Echo)
            .expect("listen");
        (server, ())
    });
    let mut bystander = connect(kit::net::tcp(&server.listeners[1].addr));
    ping(&mut bystander, b"before");
    await_end(&mut connect(server.addr()));
    await_error("the framer's making");
    ping(&mut bystander, b"after the first");
    let mut client = connect(server.addr());
    send2(&mut client, b"hello");
    assert_eq!(recv2(&mut client), b"hello");
    drop(client);
    server.until("it has gone", |stats| stats.open == 1);
    await_error("the framer's drop");
    ping(&mut bystander, b"after the second");
}

/// An error is the user's code too.
#[test]
fn an_error_whose_drop_panics() {
    collect_logs();
    let (server, journal) = spawn_script(Config::new(), local(), |cx, call| match call {
        Call::Frame(b"bomb") => Err(Close::because(Bomb("the error's drop"))),
        Call::Frame(b"twice") => {
            cx.conn.close();
            Err(Close::because(Bomb("the second error's drop")))
        }
        call => usual(cx, call),
    });
    let mut bystander = connect(server.addr());
    ping(&mut bystander, b"before");
    for how in [&b"bomb"[..], b"twice"] {
        let mut client = connect(server.addr());
        send2(&mut client, how);
        await_end(&mut client);
        drop(client);
        server.until("its place is free", |stats| stats.open == 1);
        ping(&mut bystander, b"after");
    }
    assert_eq!(
        journal.until_closed(2),
        [CloseReason::Failed, CloseReason::Closed]
    );
}

/// The text of an error is the user's code: its panic stands for it, in the log and the list of the last closes.
#[test]
fn an_error_whose_text_panics() {
    #[derive(Debug)]
    struct Mute;
    impl fmt::Display for Mute {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            panic!("the mute error's text");
        }
    }
    impl Error for Mute {}
    struct Fails;
    impl Handler for Fails {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            if frame == b"mute" {
                return Err(Close::because(Mute));
            }
            cx.conn.send(frame)?;
            Ok(())
        }
    }
    collect_logs();
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(local(), |_: &mut (), _| Fails)
            .expect("listen");
        (server, ())
    });
    let mut bystander = connect(server.addr());
    ping(&mut bystander, b"before");
    let mut client = connect(server.addr());
    send2(&mut client, b"mute");
    await_end(&mut client);
    drop(client);
    let stats = server.until("it has gone", |stats| stats.closed_total() == 1);
    assert_eq!((stats.closed(CloseReason::Failed), stats.panics), (1, 2));
    ping(&mut bystander, b"after");
    let last = server.ask(|(), control| control.recent_closes().remove(0));
    let error = last.error.expect("an error");
    assert!(error.contains("the mute error's text"), "{error}");
    await_error("an error's text panicked: the mute error's text");
    await_line(Level::Debug, "the mute error's text");
}

/// It stays the cause, and the handler's own error is dropped.
#[test]
fn a_framers_error_whose_drop_panics() {
    struct Refuses;
    impl Framer for Refuses {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
            if input.starts_with(b"bad") {
                return Err(FrameError::new(Bomb("the framer's error's drop")));
            }
            let length = input.len();
            Ok(Decoded::Frame {
                payload: 0..length,
                consumed: length,
            })
        }
    }
    collect_logs();
    let listen = local().with(|listen| listen.framing = Framing::custom(|| Refuses));
    let (server, journal) = spawn_script(Config::new(), listen, |cx, call| match call {
        Call::BadInput(_) => Err(Close::because("the handler's own")),
        call => usual(cx, call),
    });
    let mut bystander = connect(server.addr());
    ping(&mut bystander, b"before");
    let mut client = connect(server.addr());
    client.write_all(b"bad").expect("sent");
    await_end(&mut client);
    drop(client);
    journal.until_closed(1);
    let causes = journal.pick(|entry| match entry {
        Entry::Close(reason, error) => Some((*reason, error.clone())),
        _ => None,
    });
    let error = "the framer's error's drop".to_owned();
    let cause = (CloseReason::BadFrame, Some(error));
    assert_eq!(causes, [cause]);
    ping(&mut bystander, b"after");
    let stats = server.until("its place is free", |stats| stats.open == 1);
    assert_eq!(stats.panics, 1);
    await_error("an error's destructor panicked: the framer's error's drop");
}

#[test]
fn a_job_that_panics() {
    collect_logs();
    let (server, journal) = spawn_script(Config::new(), local(), usual);
    let mut client = connect(server.addr());
    ping(&mut client, b"before");
    let answer: Result<(), HandleError> = server
        .handle
        .call(kit::net::PATIENCE, |(), _| panic!("the job's panic"));
    assert_eq!(answer, Err(HandleError::Panicked));
    server
        .handle
        .post(|(), _| panic!("the posted job's panic"))
        .expect("post");
    ping(&mut client, b"after");
    server.until("both are counted", |stats| stats.panics == 2);
    assert_eq!(journal.reasons(), []);
    await_error("the posted job's panic");
}

fn id_of(server: &Running, peer: SocketAddr) -> ConnId {
    let mut id = None;
    eventually("it is in", || {
        let all = server.ask(|(), control| control.connections());
        id = all
            .iter()
            .find(|info| info.peer == peer)
            .map(|info| info.id);
        id.is_some()
    });
    id.expect("in")
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Close,
    Abort,
    CloseOther,
    AbortOther,
    SendOther,
    Replace,
    PauseOther,
    Stop,
}

const ACTIONS: [Action; 8] = [
    Action::Close,
    Action::Abort,
    Action::CloseOther,
    Action::AbortOther,
    Action::SendOther,
    Action::Replace,
    Action::PauseOther,
    Action::Stop,
];

/// Each action from each callback, `on_close` included.
#[test]
fn any_action_from_any_callback() {
    let mut callbacks = CALLBACKS.to_vec();
    callbacks.push(Entry::Close(CloseReason::Closed, None));
    for wanted in &callbacks {
        for action in ACTIONS {
            do_from(wanted, action);
        }
    }
}

fn do_from(wanted: &Entry, action: Action) {
    let what = format!("{action:?} from {wanted:?}");
    let place = wanted.clone();
    let other: Arc<Mutex<Option<ConnId>>> = Arc::default();
    let handle: Arc<Mutex<Option<portcullis::Handle>>> = Arc::default();
    let (known, reach) = (Arc::clone(&other), Arc::clone(&handle));
    let successor = Journal::default();
    let notes = successor.clone();
    // Also a client that finishes at once gets its callbacks.
    let listen = local().with(|listen| {
        listen.evict_silent = false;
        listen.socket.send_buffer = Some(16 * 1024);
        listen.conn.low_watermark = 4 * 1024;
        listen.conn.high_watermark = 64 * 1024;
    });
    let (server, journal) = spawn_script(Config::new(), listen, move |cx, call| {
        let other = *known.lock().expect("other").get_or_insert(cx.conn.id());
        if other == cx.conn.id() || entry(&call) != place {
            return provoked(cx, call);
        }
        match action {
            Action::Close => cx.conn.close(),
            Action::Abort => cx.conn.abort(),
            Action::CloseOther => cx.conn.peer(other).expect("there").close(),
            Action::AbortOther => cx.conn.peer(other).expect("there").abort(),
            Action::SendOther => {
                let sent = cx.conn.peer(other).expect("there").send(b"from another");
                // A drain has told it before, and it closed.
                assert!(sent.is_ok() || place == Entry::Drain, "{sent:?}");
            }
            Action::Replace => cx
                .conn
                .replace_handler(ScriptedHandler::successor(notes.noting(provoked))),
            Action::PauseOther => {
                let mut other = cx.conn.peer(other).expect("there");
                other.pause();
                other.resume();
            }
            Action::Stop => {
                let handle = reach.lock().expect("handle").clone().expect("set");
                // Blocking questions are refused here instead of waiting for ever.
                let asked = handle.call(Duration::from_secs(1), |(), _| ());
                assert_eq!(asked, Err(HandleError::OwnThread));
                handle.stop().expect("stop");
            }
        }
        if matches!(action, Action::Close | Action::Abort) {
            // Nothing is sent to a closing connection.
            assert!(matches!(cx.conn.send(b"late"), Err(SendError::Closed)));
        }
        // The rest is as usual, for the peer to come to its end.
        provoked(cx, call)?;
        Ok(())
    });
    *handle.lock().expect("handle") = Some(server.handle.clone());
    let mut bystander = connect(server.addr());
    ping(&mut bystander, b"first");
    let before = journal.count(wanted);
    let client = provoke(&server, wanted);
    if matches!(wanted, Entry::Timer(_) | Entry::Message) {
        eventually(&what, || journal.count(wanted) > before);
    }
    if action == Action::Stop {
        // The server ends with its thread, and all connections with it.
        client.iter().for_each(|client| drop(hear(client)));
        await_end(&mut bystander);
        eventually(&what, || {
            server.handle.stop() == Err(HandleError::ServerGone)
        });
        return;
    }
    if let Some(client) = client {
        if *wanted != Entry::Drain {
            let _ = client.shutdown(Shutdown::Write);
        }
        hear(&client);
    }
    match action {
        // All are sent home in any case.
        _ if *wanted == Entry::Drain => {}
        Action::CloseOther => assert_eq!(read_to_end(&mut bystander), b"", "{what}"),
        Action::AbortOther => assert!(bystander.read_some(&mut [0; 9]).is_err(), "{what}"),
        Action::SendOther => assert_eq!(recv2(&mut bystander), b"from another", "{what}"),
        _ => ping(&mut bystander, b"unharmed"),
    }
    drop(bystander);
    eventually(&what, || {
        server.handle.stats().open == 0 && server.handle.stats().closed_total() == 2
    });
    let reasons: Vec<_> = journal
        .reasons()
        .into_iter()
        .chain(successor.reasons())
        .collect();
    assert_eq!(reasons.len(), 2, "{what}: {reasons:?}");
    let own = match action {
        Action::Close if *wanted == Entry::Drain => Some(CloseReason::Drained),
        Action::Close if *wanted == Entry::Finish => Some(CloseReason::Finished),
        Action::Close => Some(CloseReason::Closed),
        Action::Abort if !matches!(wanted, Entry::Close(..)) => Some(CloseReason::Aborted),
        Action::AbortOther if *wanted != Entry::Drain => Some(CloseReason::Aborted),
        _ => None,
    };
    assert!(
        own.is_none_or(|own| reasons.contains(&own)),
        "{what}: {reasons:?}"
    );
    let stats = server.handle.stats();
    assert_eq!(
        (
            stats.accepted,
            stats.opened,
            stats.closed_total(),
            stats.panics
        ),
        (2, 2, 2, 0),
        "{what}"
    );
}

/// A handler that kills its own connection through a job, which finds it again or not.
#[test]
fn a_handler_kills_itself_by_a_job() {
    let handle: Arc<Mutex<Option<portcullis::Handle>>> = Arc::default();
    let reach = Arc::clone(&handle);
    let (server, journal) = spawn_script(Config::new(), local(), move |cx, call| match call {
        Call::Frame(_) => {
            let handle = reach.lock().expect("handle").clone().expect("set");
            let id = cx.conn.id();
            for _ in 0..3 {
                handle.post(move |(), control| {
                    control.kill(id);
                })?;
                handle.kill(id)?;
            }
            Ok(())
        }
        call => usual(cx, call),
    });
    *handle.lock().expect("handle") = Some(server.handle.clone());
    let mut bystander = connect(server.addr());
    // Known before the others come and go.
    server.until("it is in", |stats| stats.opened == 1);
    for _ in 0..10 {
        let mut client = connect(server.addr());
        send2(&mut client, b"kill me");
        assert!(client.read_some(&mut [0; 9]).is_err(), "RST");
    }
    assert_eq!(journal.until_closed(10), [CloseReason::Killed; 10]);
    let _ = bystander.shutdown(Shutdown::Write);
    assert_eq!(read_to_end(&mut bystander), b"");
}

/// UBF: errors through `?` close with themselves as the cause, and what was sent before arrives.
#[test]
fn an_error_is_the_cause() {
    let (server, journal) = spawn_script(Config::new(), local(), |cx, call| match call {
        Call::Frame(frame) => {
            cx.conn.send(b"before")?;
            let number: u32 = std::str::from_utf8(frame)?.parse()?;
            cx.conn.send(number.to_be_bytes())?;
            Ok(())
        }
        Call::Finish => Err(Close::because("no goodbye")),
        call => usual(cx, call),
    });
    let mut client = connect(server.addr());
    send2(&mut client, b"12a");
    assert_eq!(read_to_end(&mut client), packet2(b"before"));
    drop(client);
    journal.until_closed(1);
    let mut client = server.connect_open();
    client.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(read_to_end(&mut client), b"");
    journal.until_closed(2);
    let causes = journal.pick(|entry| match entry {
        Entry::Close(reason, error) => Some((*reason, error.clone())),
        _ => None,
    });
    assert_eq!(
        causes,
        [
            (
                CloseReason::Failed,
                Some("invalid digit found in string".to_owned())
            ),
            (CloseReason::Failed, Some("no goodbye".to_owned()))
        ]
    );
}

/// The login: one line, then packets. Both come in one segment.
#[test]
fn the_framing_changes_inside_a_segment() {
    struct Login;
    impl Handler for Login {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            cx.conn
                .send(format!("welcome {}", String::from_utf8_lossy(frame)).as_bytes())?;
            cx.conn.set_framing(&Framing::Packet2);
            cx.conn.replace_handler(Echo);
            Ok(())
        }
    }
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(
                local().with(|listen| listen.framing = Framing::Line),
                |_: &mut (), _| Login,
            )
            .expect("listen");
        (server, ())
    });
    let wire = [
        b"ann\n".to_vec(),
        packet2(b"one\ntwo"),
        packet2(b""),
        packet2(&[b'\n'; 70]),
    ]
    .concat();
    // Whole, and cut at every byte.
    for cut in 0..=wire.len() {
        let mut client = connect(server.addr());
        client.write_all(&wire[..cut]).expect("write");
        client.write_all(&wire[cut..]).expect("write");
        let mut welcome = [0; 12];
        client.read_exact(&mut welcome).expect("welcome");
        assert_eq!(&welcome, b"welcome ann\n");
        assert_eq!(recv2(&mut client), b"one\ntwo");
        assert_eq!(recv2(&mut client), b"");
        assert_eq!(recv2(&mut client), [b'\n'; 70]);
    }
}

/// Erlang's `{active, once}`: a frame, and no more until asked.
#[test]
fn one_frame_at_a_time() {
    let (server, journal) = spawn_script(Config::new(), local(), {
        let mut paused = false;
        move |cx, call| match call {
            Call::Frame(frame) => {
                assert!(!paused, "a frame came while paused");
                paused = true;
                cx.conn.pause();
                cx.conn.send(frame)?;
                cx.conn.set_timer(1, Duration::ZERO);
                Ok(())
            }
            Call::Timer(_) => {
                paused = false;
                cx.conn.resume();
                Ok(())
            }
            Call::Finish => {
                assert!(!paused, "the end came before its turn");
                cx.conn.close();
                Ok(())
            }
            call => usual(cx, call),
        }
    });
    let mut client = connect(server.addr());
    let wire: Vec<u8> = (0..200u8).flat_map(|number| packet2(&[number])).collect();
    client.write_all(&wire).expect("write");
    client.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(read_to_end(&mut client), wire);
    assert_eq!(journal.until_closed(1), [CloseReason::Finished]);
    assert_eq!(journal.count(&Entry::Timer(1)), 200);
}

/// Paused and resumed from outside, with everything waiting in the kernel meanwhile.
#[test]
fn a_pause_from_outside() {
    let (server, journal) = spawn_script(Config::new(), local(), usual);
    let mut client = connect(server.addr());
    ping(&mut client, b"hello");
    let id = id_of(&server, client.local_addr().expect("addr"));
    server.ask(move |(), control| control.conn(id).expect("there").pause());
    send2(&mut client, b"waits");
    client.shutdown(Shutdown::Write).expect("FIN");
    for _ in 0..20 {
        server.ask(|(), _| ());
    }
    assert_eq!(
        (journal.count(&Entry::Frame), journal.count(&Entry::Finish)),
        (1, 0)
    );
    server.ask(move |(), control| control.conn(id).expect("there").resume());
    assert_eq!(read_to_end(&mut client), packet2(b"waits"));
    assert_eq!(journal.until_closed(1), [CloseReason::Finished]);
}

/// Every connection sends to every other from `on_close`, while all end at once.
#[test]
fn farewells_from_on_close_while_all_are_killed() {
    let members: Arc<Mutex<Vec<ConnId>>> = Arc::default();
    let list = Arc::clone(&members);
    let (server, journal) = spawn_script(Config::new(), local(), move |cx, call| match call {
        Call::Open => {
            list.lock().expect("list").push(cx.conn.id());
            Ok(())
        }
        Call::Close(_) => {
            let own = cx.conn.id();
            let others = list.lock().expect("list").clone();
            for id in others.into_iter().filter(|id| *id != own) {
                if let Some(mut peer) = cx.conn.peer(id) {
                    let _ = peer.send(b"farewell");
                    peer.abort();
                }
            }
            Ok(())
        }
        call => usual(cx, call),
    });
    let clients: Vec<_> = (0..30).map(|_| connect(server.addr())).collect();
    server.until("all are in", |stats| stats.opened == 30);
    let still = hold(&server.handle);
    for id in members.lock().expect("members").iter().step_by(3) {
        server.handle.kill(*id).expect("alive");
    }
    drop(still);
    journal.until_closed(30);
    journal.assert_whole_lives();
    drop(clients);
    let (stats, ()) = server.finish();
    assert_eq!(
        stats.closed(CloseReason::Killed) + stats.closed(CloseReason::Aborted),
        30
    );
}

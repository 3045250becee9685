//! Handlers that do what a test says: the one [`ScriptedHandler`] makes each callback a call of its script, and checks what holds for
//! the callbacks of any handler. A journal keeps what handlers were told.

use std::cell::Cell;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};

use portcullis::{
    CloseReason, Closed, Config, ConnId, Context, Handler, Listen, Message, Outcome, Server,
};
use socket2::{Domain, Socket, Type};

use crate::net::{eventually, spawn, Running, PATIENCE};

/// One callback.
pub enum Call<'a> {
    Open,
    Secured,
    Frame(&'a [u8]),
    BadInput(&'a Closed),
    Finish,
    Writable,
    Flushed,
    Timer(u8),
    Message(Message),
    Drain,
    Close(&'a Closed),
    ConnectFailed(&'a Closed),
}

impl Call<'_> {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Secured => "secured",
            Self::Frame(_) => "frame",
            Self::BadInput(_) => "bad input",
            Self::Finish => "finish",
            Self::Writable => "writable",
            Self::Flushed => "flushed",
            Self::Timer(_) => "timer",
            Self::Message(_) => "message",
            Self::Drain => "drain",
            Self::Close(_) => "close",
            Self::ConnectFailed(_) => "connect failed",
        }
    }
}

/// What a handler does in its callbacks.
pub trait Play<A> {
    /// The outcome of a callback that has none is dropped.
    fn play(&mut self, cx: &mut Context<'_, A>, call: Call<'_>) -> Outcome;
}

impl<A, F> Play<A> for F
where
    F: FnMut(&mut Context<'_, A>, Call<'_>) -> Outcome,
{
    fn play(&mut self, cx: &mut Context<'_, A>, call: Call<'_>) -> Outcome {
        self(cx, call)
    }
}

/// Where a handler is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    New,
    Open,
    Over,
}

/// A handler that plays a script.
///
/// # Panics
///
/// In its callbacks, if the server breaks what it promises to every handler: one callback at a time on its thread; first
/// `on_open`, last `on_close`, each once; or `on_connect_failed` alone.
#[derive(Debug)]
pub struct ScriptedHandler<P> {
    life: Life,
    play: P,
}

impl<P> ScriptedHandler<P> {
    pub fn new(play: P) -> Self {
        Self {
            life: Life::New,
            play,
        }
    }

    /// For a connection that is open: it takes the place of another handler, and is not told that it opens.
    pub fn successor(play: P) -> Self {
        Self {
            life: Life::Open,
            play,
        }
    }

    fn call<A>(&mut self, cx: &mut Context<'_, A>, call: Call<'_>) -> Outcome
    where
        P: Play<A>,
    {
        let (before, after) = match call {
            Call::Open => (Life::New, Life::Open),
            Call::ConnectFailed(_) => (Life::New, Life::Over),
            Call::Close(_) => (Life::Open, Life::Over),
            _ => (Life::Open, Life::Open),
        };
        let life = std::mem::replace(&mut self.life, after);
        assert_eq!(life, before, "on_{} of {}", call.name(), cx.conn.id());
        let _inside = Inside::begin();
        self.play.play(cx, call)
    }
}

/// While a callback or a job runs: no other is entered on the same thread.
#[must_use]
pub struct Inside(());

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Inside {
    /// # Panics
    ///
    /// If another one runs.
    pub fn begin() -> Self {
        assert!(
            !INSIDE.replace(true),
            "a callback was entered from inside another"
        );
        Self(())
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(false);
    }
}

impl<A, P: Play<A>> Handler<A> for ScriptedHandler<P> {
    fn on_open(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        self.call(cx, Call::Open)
    }

    fn on_secured(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        self.call(cx, Call::Secured)
    }

    fn on_frame(&mut self, cx: &mut Context<'_, A>, frame: &[u8]) -> Outcome {
        self.call(cx, Call::Frame(frame))
    }

    fn on_bad_input(&mut self, cx: &mut Context<'_, A>, closed: &Closed) -> Outcome {
        self.call(cx, Call::BadInput(closed))
    }

    fn on_finish(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        self.call(cx, Call::Finish)
    }

    fn on_writable(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        self.call(cx, Call::Writable)
    }

    fn on_flushed(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        self.call(cx, Call::Flushed)
    }

    fn on_timer(&mut self, cx: &mut Context<'_, A>, key: u8) -> Outcome {
        self.call(cx, Call::Timer(key))
    }

    fn on_message(&mut self, cx: &mut Context<'_, A>, message: Message) -> Outcome {
        self.call(cx, Call::Message(message))
    }

    fn on_drain(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        self.call(cx, Call::Drain)
    }

    fn on_close(&mut self, cx: &mut Context<'_, A>, closed: &Closed) {
        let _ = self.call(cx, Call::Close(closed));
    }

    fn on_connect_failed(&mut self, cx: &mut Context<'_, A>, closed: &Closed) {
        let _ = self.call(cx, Call::ConnectFailed(closed));
    }
}

/// What a handler with only an echoing `on_frame` does.
pub fn usual<A>(cx: &mut Context<'_, A>, call: Call<'_>) -> Outcome {
    match call {
        Call::Frame(frame) => cx.conn.send(frame)?,
        Call::Finish => cx.conn.close(),
        Call::Drain => cx.conn.close_after_input(),
        _ => {}
    }
    Ok(())
}

/// A callback as the journal remembers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Open,
    Secured,
    Frame,
    BadInput(CloseReason),
    Finish,
    Writable,
    Flushed,
    Timer(u8),
    Message,
    Drain,
    /// The reason, and the error behind it.
    Close(CloseReason, Option<String>),
    ConnectFailed(CloseReason),
}

impl Call<'_> {
    pub fn entry(&self) -> Entry {
        match self {
            Self::Open => Entry::Open,
            Self::Secured => Entry::Secured,
            Self::Frame(_) => Entry::Frame,
            Self::BadInput(closed) => Entry::BadInput(closed.reason),
            Self::Finish => Entry::Finish,
            Self::Writable => Entry::Writable,
            Self::Flushed => Entry::Flushed,
            Self::Timer(key) => Entry::Timer(*key),
            Self::Message(_) => Entry::Message,
            Self::Drain => Entry::Drain,
            Self::Close(closed) => Entry::Close(
                closed.reason,
                closed.error.as_ref().map(ToString::to_string),
            ),
            Self::ConnectFailed(closed) => Entry::ConnectFailed(closed.reason),
        }
    }
}

/// What all connections of a server were told, in order.
#[derive(Clone, Debug, Default)]
pub struct Journal(Arc<Mutex<Vec<(ConnId, Entry)>>>);

impl Journal {
    pub fn note(&self, id: ConnId, entry: Entry) {
        self.0.lock().expect("journal").push((id, entry));
    }

    pub fn all(&self) -> Vec<(ConnId, Entry)> {
        self.0.lock().expect("journal").clone()
    }

    pub fn count(&self, wanted: &Entry) -> usize {
        self.all()
            .iter()
            .filter(|(_, entry)| entry == wanted)
            .count()
    }

    /// The entries of all connections that `pick` picks from.
    pub fn pick<T>(&self, pick: impl Fn(&Entry) -> Option<T>) -> Vec<T> {
        self.all()
            .iter()
            .filter_map(|(_, entry)| pick(entry))
            .collect()
    }

    /// The reasons of those that ended so far, in order.
    pub fn reasons(&self) -> Vec<CloseReason> {
        self.pick(|entry| match entry {
            Entry::Close(reason, _) => Some(*reason),
            _ => None,
        })
    }

    /// Waits until `count` have ended, and returns why.
    #[track_caller]
    pub fn until_closed(&self, count: usize) -> Vec<CloseReason> {
        eventually("the connections end", || self.reasons().len() >= count);
        self.reasons()
    }

    /// Every connection was opened once, first, and closed once, last; all of them have ended.
    #[track_caller]
    pub fn assert_whole_lives(&self) {
        let all = self.all();
        let mut ids: Vec<ConnId> = Vec::new();
        for (id, _) in &all {
            if !ids.contains(id) {
                ids.push(*id);
            }
        }
        for id in ids {
            let life: Vec<&Entry> = all
                .iter()
                .filter(|(of, _)| *of == id)
                .map(|(_, entry)| entry)
                .collect();
            let opens = life.iter().filter(|entry| ***entry == Entry::Open).count();
            let closes = life
                .iter()
                .filter(|entry| matches!(entry, Entry::Close(..)))
                .count();
            assert_eq!((opens, closes), (1, 1), "{life:?}");
            assert_eq!(life[0], &Entry::Open, "{life:?}");
            assert!(matches!(life[life.len() - 1], Entry::Close(..)), "{life:?}");
        }
    }
}

/// Notes each callback, and then plays on.
#[derive(Debug)]
pub struct Noting<P> {
    journal: Journal,
    play: P,
}

impl<A, P: Play<A>> Play<A> for Noting<P> {
    fn play(&mut self, cx: &mut Context<'_, A>, call: Call<'_>) -> Outcome {
        self.journal.note(cx.conn.id(), call.entry());
        self.play.play(cx, call)
    }
}

impl Journal {
    /// A script whose callbacks are noted here.
    pub fn noting<P>(&self, play: P) -> Noting<P> {
        Noting {
            journal: self.clone(),
            play,
        }
    }
}

/// A server whose connections each play a copy of `play`.
#[track_caller]
pub fn spawn_script<F>(config: Config, listen: Listen, play: F) -> (Running, Journal)
where
    F: FnMut(&mut Context<'_, ()>, Call<'_>) -> Outcome + Clone + Send + 'static,
{
    let journal = Journal::default();
    let notes = journal.clone();
    let running = spawn(move || {
        let mut server = Server::new(config).expect("server");
        server
            .listen(listen, move |_app: &mut (), _peer| {
                ScriptedHandler::new(notes.noting(play.clone()))
            })
            .expect("listen");
        (server, ())
    });
    (running, journal)
}

/// A client whose kernel holds little that it has not read.
#[track_caller]
pub fn connect_narrow(addr: SocketAddr) -> TcpStream {
    try_connect_narrow(addr).expect("connect")
}

pub fn try_connect_narrow(addr: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    socket.set_recv_buffer_size(4096)?;
    socket.connect_timeout(&addr.into(), PATIENCE)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket.into())
}

/// Writes until the other side takes no more, then gives the stream back as it was. Returns how much went.
#[track_caller]
pub fn fill(stream: &mut TcpStream, bytes: &[u8]) -> usize {
    stream.set_nonblocking(true).expect("nonblocking");
    let mut sent = 0;
    while sent < bytes.len() {
        match stream.write(&bytes[sent..]) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => panic!("fill: {error}"),
        }
    }
    stream.set_nonblocking(false).expect("blocking");
    sent
}

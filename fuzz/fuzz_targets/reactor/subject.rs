//! An echo that does other things besides, as its world's list of actions says, and checks how it is called.

use std::collections::HashMap;
use std::fmt::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kit::outgoing::connected_socket;
use kit::planned::{blow, PanicOnDrop};
use kit::script::{Call, Inside, Play, ScriptedHandler};
use libfuzzer_sys::arbitrary::{self, Arbitrary, Unstructured};
use portcullis::{
    Addr, Close, CloseReason, Conn, ConnId, Connect, Context, Control, Handle, HandleError,
    Outcome, State,
};

use crate::framing::framing;

/// What a handler does of itself in a callback. One callback does all up to the next `Rest`.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    Rest,
    /// To itself or a neighbour: see [`App::one_of`].
    Act(u8, Act),
    /// Through the server's handle, as another thread would.
    Order(u8, Order),
    /// In a job posted to its own loop.
    Post(Job),
    End(End),
    /// Its destructor panics.
    PanicLater,
    /// It blocks the loop, in milliseconds.
    Work(u8),
}

#[derive(Clone, Copy, Debug)]
pub enum Act {
    Send(u8),
    Close,
    CloseAfterInput,
    Abort,
    Pause,
    Resume,
    SetTimer(u8, u8),
    CancelTimer(u8),
    SetFraming(u8),
    SetMaxFrame(u8),
    Replace,
    Detach,
}

#[derive(Clone, Copy, Debug)]
pub enum Order {
    Send(u8),
    Notify,
    Kill,
    Drain(u8),
    Stop,
    Call,
}

#[derive(Clone, Copy, Debug)]
pub enum Job {
    Act(u8, Act),
    Kill(u8),
    SetCap(u8),
    Suspend(bool),
    CloseListener,
    /// A socket is adopted.
    Adopt(u8),
    Drain(u8),
    /// All peers, for so long; or none any more.
    Ban(u8),
    Panic,
}

#[derive(Clone, Copy, Debug)]
pub enum End {
    Close,
    Abort,
    Fail,
    Panic,
}

impl<'a> Arbitrary<'a> for Action {
    /// Three bytes each: one byte changed changes one thing.
    fn arbitrary(input: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let [what, target, how] = input.arbitrary()?;
        let (kind, which) = (what % 16, what / 16);
        Ok(match kind {
            0..=4 => Self::Rest,
            5..=9 => Self::Act(target, Act::new(which, how)),
            10..=11 => Self::Order(target, Order::new(which, how)),
            12..=13 => Self::Post(Job::new(which, target, how)),
            14 => Self::End(END[usize::from(which % 4)]),
            _ if which == 0 => Self::PanicLater,
            _ if which == 1 => Self::Work(how),
            _ => Self::Act(0, Act::new(which, how)),
        })
    }
}

const END: [End; 4] = [End::Close, End::Abort, End::Fail, End::Panic];

impl Act {
    fn new(which: u8, how: u8) -> Self {
        match which {
            0 => Self::Close,
            1 => Self::CloseAfterInput,
            2 => Self::Abort,
            3..=4 => Self::Pause,
            5..=6 => Self::Resume,
            7..=8 => Self::SetTimer(how % 4, how / 4),
            9 => Self::CancelTimer(how % 4),
            10 => Self::SetFraming(how),
            11 => Self::SetMaxFrame(how),
            12 => Self::Replace,
            13 => Self::Detach,
            _ => Self::Send(how),
        }
    }
}

impl Order {
    fn new(which: u8, how: u8) -> Self {
        match which {
            0..=4 => Self::Send(how),
            5..=9 => Self::Notify,
            10..=11 => Self::Kill,
            12 => Self::Drain(how),
            13 => Self::Stop,
            _ => Self::Call,
        }
    }
}

impl Job {
    fn new(which: u8, target: u8, how: u8) -> Self {
        match which {
            0..=6 => Self::Act(target, Act::new(how % 16, how)),
            7 => Self::Adopt(how),
            8 => Self::Kill(target),
            9 => Self::Ban(how),
            10 => Self::SetCap(how),
            11..=12 => Self::Suspend(how % 2 == 0),
            13 => Self::CloseListener,
            14 => Self::Drain(how),
            _ => Self::Panic,
        }
    }
}

impl Action {
    /// Clients hear something besides their echoes, or hear them in another framing.
    pub fn talks(&self) -> bool {
        matches!(
            self,
            Self::Order(_, Order::Send(_))
                | Self::Act(_, Act::Send(_) | Act::SetFraming(_))
                | Self::Post(Job::Act(_, Act::Send(_) | Act::SetFraming(_)))
        )
    }
}

/// The simulated kernel has no other addresses.
pub fn tcp(addr: &Addr) -> SocketAddr {
    addr.as_tcp().expect("a TCP address")
}

/// What all handlers of one world share.
pub struct App {
    pub handle: Option<Handle<App>>,
    actions: Vec<Action>,
    next: usize,
    left: usize,
    pub opened: u64,
    pub live: Vec<ConnId>,
    /// The one that closed last.
    former: Option<ConnId>,
    pub reasons: HashMap<SocketAddr, CloseReason>,
    pub failed_accepts: HashMap<SocketAddr, CloseReason>,
    /// Adopted sockets that ended before they were open.
    pub failed_connects: u64,
    /// There has been a ban since the last was lifted.
    has_banned: bool,
    /// Lets time pass in a callback.
    pub work: Option<Box<dyn Fn(Duration)>>,
}

impl App {
    pub fn new(actions: Vec<Action>, most: usize) -> Self {
        Self {
            handle: None,
            actions,
            next: 0,
            left: most,
            opened: 0,
            live: Vec::new(),
            former: None,
            reasons: HashMap::new(),
            failed_accepts: HashMap::new(),
            failed_connects: 0,
            has_banned: false,
            work: None,
        }
    }

    /// The next of the actions, which begin again at their end.
    fn next_action(&mut self) -> Option<Action> {
        self.left = self.left.checked_sub(1)?;
        let action = *self.actions.get(self.next)?;
        self.next = (self.next + 1) % self.actions.len();
        Some(action)
    }

    /// A connection by number: 0 is `me`, 255 one that has gone, all others are those that are open.
    fn one_of(&self, me: Option<ConnId>, number: u8) -> Option<ConnId> {
        match number {
            0 => me,
            u8::MAX => self.former,
            number => usize::from(number)
                .checked_rem(self.live.len())
                .map(|at| self.live[at]),
        }
    }
}

pub struct Subject {
    /// `None` for an adopted socket, until it is known.
    peer: Option<SocketAddr>,
    fuse: Option<PanicOnDrop>,
}

impl Subject {
    pub fn of(peer: SocketAddr) -> Self {
        Self {
            peer: Some(peer),
            fuse: None,
        }
    }

    fn adopted() -> Self {
        Self {
            peer: None,
            fuse: None,
        }
    }

    /// What holds in every callback of an open connection.
    fn check(&mut self, cx: &mut Context<'_, App>) {
        assert!(
            cx.app.live.contains(&cx.conn.id()),
            "not open: {:?}",
            cx.conn
        );
        let info = cx.conn.info().expect("a callback's own connection");
        let peer = *self.peer.get_or_insert(tcp(&info.peer));
        assert_eq!(
            (tcp(&info.peer), info.state),
            (peer, cx.conn.state()),
            "another's callback"
        );
        assert!(cx.conn.state() == State::Open || cx.conn.send(b"too late").is_err());
        if let Some(former) = cx.app.former {
            let is_live = cx
                .app
                .handle
                .as_ref()
                .is_some_and(|handle| handle.is_live(former));
            assert!(
                !is_live && cx.conn.peer(former).is_none(),
                "{former} has gone"
            );
        }
    }

    fn do_actions(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        let me = cx.conn.id();
        while let Some(action) = cx.app.next_action() {
            match action {
                Action::Rest => break,
                Action::Act(number, act) => {
                    let target = cx.app.one_of(Some(me), number);
                    if let Some(mut conn) = target.and_then(|id| cx.conn.peer(id)) {
                        perform(&mut conn, act);
                    }
                }
                Action::Order(number, order) => {
                    let target = cx.app.one_of(Some(me), number);
                    if let (Some(handle), Some(target)) = (&cx.app.handle, target) {
                        give(handle, target, order);
                    }
                }
                Action::Post(job) => {
                    if let Some(handle) = &cx.app.handle {
                        // Refused when too many wait, which is a result too.
                        let _ = handle.post(move |app, control| carry_out(app, control, job));
                    }
                }
                Action::End(End::Close) => return Err(Close::new()),
                Action::End(End::Abort) => return Err(Close::abort()),
                Action::End(End::Fail) => return Err(Close::because("as planned")),
                Action::End(End::Panic) => blow(),
                Action::Work(ticks) => {
                    if let Some(work) = &cx.app.work {
                        work(Duration::from_millis(u64::from(ticks).pow(2)));
                    }
                }
                Action::PanicLater => {
                    self.fuse.get_or_insert_with(|| PanicOnDrop);
                }
            }
        }
        Ok(())
    }
}

fn perform(conn: &mut Conn<'_, App>, act: Act) {
    match act {
        // It may be closing, or full: both are results.
        Act::Send(length) => {
            send(conn, length);
            if length % 4 == 0 {
                conn.notify_flushed();
            }
        }
        Act::Close => conn.close(),
        Act::CloseAfterInput => conn.close_after_input(),
        Act::Abort => conn.abort(),
        Act::Pause => conn.pause(),
        Act::Resume => conn.resume(),
        Act::SetTimer(key, ticks) => {
            conn.set_timer(key, Duration::from_millis(u64::from(ticks).pow(2)))
        }
        Act::CancelTimer(key) => conn.cancel_timer(key),
        Act::SetFraming(number) => conn.set_framing(&framing(number)),
        Act::SetMaxFrame(bytes) => {
            // Zero is refused, and so is every change before it is open.
            let _ = conn.reconfigure(|conn| conn.max_frame = Some(usize::from(bytes)));
        }
        Act::Replace => conn.replace_handler(ScriptedHandler::successor(Subject::of(tcp(&conn
            .info()
            .expect("it is there")
            .peer)))),
        // It ends with its stream.
        Act::Detach => drop(conn.detach(drop)),
    }
}

/// Each length in one way.
fn send(conn: &mut Conn<'_, App>, length: u8) {
    let payload = vec![length; usize::from(length)];
    let shared: Arc<[u8]> = payload.as_slice().into();
    let (front, back) = payload.split_at(payload.len() / 2);
    let _ = match length % 6 {
        0 => conn.send(payload),
        1 => conn.send(shared),
        2 => conn.send((front, shared, back.to_vec())),
        3 => conn.send_with(|out| {
            out.put(front);
            out.put(back);
            Ok(())
        }),
        4 => {
            let id = conn.id();
            let said = conn.broadcast([id, id], shared);
            assert_eq!(said.sent + said.gone + said.refused.len(), 2);
            Ok(())
        }
        _ => conn.send(&payload),
    };
}

fn give(handle: &Handle<App>, target: ConnId, order: Order) {
    // Refused if the connection has gone or too much waits, which are results too.
    let _ = match order {
        Order::Send(length) if length % 2 == 0 => {
            handle.broadcast([target, target], vec![length; usize::from(length)]);
            Ok(())
        }
        Order::Send(length) => handle.send(target, vec![length; usize::from(length)]),
        Order::Notify => handle.notify(target, ()),
        Order::Kill => handle.kill(target),
        Order::Drain(ticks) => handle.drain(Duration::from_millis(u64::from(ticks).pow(2))),
        Order::Stop => handle.stop(),
        Order::Call => {
            let answer = handle.call(Duration::MAX, |_, _| ());
            assert_eq!(answer, Err(HandleError::OwnThread));
            Ok(())
        }
    };
}

fn carry_out(app: &mut App, control: &mut Control<'_, App>, job: Job) {
    let _inside = Inside::begin();
    match job {
        Job::Act(number, act) => {
            if let Some(mut conn) = app.one_of(None, number).and_then(|id| control.conn(id)) {
                perform(&mut conn, act);
            }
        }
        Job::Kill(number) => {
            if let Some(id) = app.one_of(None, number) {
                assert_eq!(control.kill(id), app.live.contains(&id), "{id}");
            }
        }
        Job::SetCap(connections) => control
            .reconfigure(|config| config.max_connections = connections.into())
            .expect("not too many"),
        Job::Suspend(on) => {
            for listener in control.listeners() {
                let done = if on {
                    control.suspend(listener.id)
                } else {
                    control.resume(listener.id)
                };
                done.expect("it is there");
            }
        }
        // It may have been closed before.
        Job::CloseListener => drop(control.close_listener("second")),
        Job::Adopt(number) => {
            let options = Connect::new(framing(number));
            let handler = ScriptedHandler::new(Subject::adopted());
            // Refused at the cap and in a drain, or not registered.
            let _ = control.adopt(connected_socket(), options, handler);
        }
        Job::Drain(ticks) => control.drain(Duration::from_millis(u64::from(ticks).pow(2))),
        Job::Ban(0) => {
            let may_be_banned = std::mem::take(&mut app.has_banned);
            let was_banned = control.unban("all").expect("a network");
            assert!(may_be_banned || !was_banned, "no peer was banned");
        }
        Job::Ban(ticks) => {
            let duration = Duration::from_millis(u64::from(ticks).pow(2));
            control.ban("all", duration).expect("a network");
            app.has_banned = true;
        }
        Job::Panic => blow(),
    }
}

impl Play<App> for Subject {
    /// An echo; then actions.
    fn play(&mut self, cx: &mut Context<'_, App>, call: Call<'_>) -> Outcome {
        let (id, state) = (cx.conn.id(), cx.conn.state());
        if let Call::ConnectFailed(_) = call {
            assert!(!cx.app.live.contains(&id), "{id} is open");
            cx.app.failed_connects += 1;
            return self.do_actions(cx);
        }
        if let Call::Open = call {
            assert!(!cx.app.live.contains(&id), "{id} opens twice");
            cx.app.live.push(id);
            cx.app.opened += 1;
        }
        self.check(cx);
        match call {
            Call::Frame(frame) => {
                assert_eq!(state, State::Open, "a frame after the end");
                cx.conn.send(frame)?;
            }
            Call::Finish => cx.conn.close(),
            Call::Timer(_) => cx.conn.resume(),
            Call::Message(message) => {
                assert_eq!(state, State::Open, "a message after the end");
                assert!(message.is::<()>(), "another's message");
            }
            Call::Drain => cx.conn.close_after_input(),
            Call::Close(closed) => {
                assert_eq!(state, State::Closing);
                cx.app.live.retain(|&live| live != id);
                // A detached connection has its slot until its stream is dropped.
                if closed.reason != CloseReason::Detached {
                    cx.app.former = Some(id);
                }
                let peer = tcp(&cx.conn.info().expect("it is there").peer);
                let told = cx.app.reasons.insert(peer, closed.reason);
                assert!(told.is_none(), "{id} closes twice");
            }
            _ => {}
        }
        self.do_actions(cx)
    }
}

/// Reads the log and forgets it: making its lines must not panic.
struct NullLog;

impl Write for NullLog {
    fn write_str(&mut self, _: &str) -> fmt::Result {
        Ok(())
    }
}

impl log::Log for NullLog {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        write!(Self, "{}", record.args()).expect("it takes all");
    }

    fn flush(&self) {}
}

pub fn log_without_a_reader() {
    log::set_logger(&NullLog).expect("the only logger");
    log::set_max_level(log::LevelFilter::Trace);
}

//! The handlers of the campaign: each of another kind, all of them keeping the books of [`App`].

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use portcullis::sim::Random;
use portcullis::{
    AtCapacity, Close, CloseReason, Closed, ConnId, Context, HandleError, Handler, ListenerId,
    Outcome, Peer, Refuse, SendError, Service, State,
};

use super::app::{tcp, App, Order, Talk};
use super::descriptors;
use super::plan::{ConnLimits, Door};
use super::rules::Rules;
use super::wire::Wire;
use crate::planned::blow;
use crate::script::{Call, Play, ScriptedHandler};

/// What kind of handler there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandlerKind {
    /// Sends every frame back, as all of them do.
    Echo,
    /// Pauses after each frame, and goes on by timer.
    Pausing,
    /// Pauses for ever.
    Sleeping,
    /// Closes after a few frames.
    Brief,
    /// Sends to its neighbours, pauses, closes, kills and replaces them, from every callback.
    Meddling,
    /// Panics now and then, in every callback, in its service and in its destructor.
    Panicking,
    /// Changes its framing inside `on_frame`.
    Shifting,
    /// Pauses, changes framing while paused, resumes by timer.
    Starttls,
    /// Gives orders through the server's handle, one or a flood, from every callback.
    Posting,
    /// Ends itself in every way there is.
    Suicidal,
    /// Sends a farewell to every connection from `on_close`.
    Clinging,
    /// Closes neither when its peer finishes nor when the server drains.
    Stubborn,
    /// Sends until it is refused, again and again.
    Flooding,
    /// Sets a timer to zero, again and again.
    Ticking,
    /// Upgrades to TLS, where there is none; most often when nothing is under way.
    Upgrading,
    /// Sends nothing more after the second frame, and goes on reading.
    Halving,
    /// Uses the server's controls: messages, timers, kills, questions and descriptors from every
    /// callback.
    Managing,
}

impl HandlerKind {
    pub const ALL: [Self; 17] = [
        Self::Echo,
        Self::Pausing,
        Self::Sleeping,
        Self::Brief,
        Self::Meddling,
        Self::Panicking,
        Self::Shifting,
        Self::Starttls,
        Self::Posting,
        Self::Suicidal,
        Self::Clinging,
        Self::Stubborn,
        Self::Flooding,
        Self::Ticking,
        Self::Upgrading,
        Self::Halving,
        Self::Managing,
    ];
}

/// One connection's script.
pub struct Subject {
    door: Rc<Door>,
    random: Random,
    frames: usize,
    /// What it may still do of what would never end.
    energy: usize,
    /// When its timer 1 is due, where that is known.
    due: Option<Duration>,
    _panic_on_drop: Option<PanicOnDrop>,
}

/// Panics when it is dropped.
struct PanicOnDrop(Rc<Cell<bool>>, Rc<Cell<u64>>);

impl Drop for PanicOnDrop {
    fn drop(&mut self) {
        if self.0.get() && !std::thread::panicking() {
            self.1.set(self.1.get() + 1);
            blow();
        }
    }
}

impl Subject {
    pub fn new(door: &Rc<Door>, app: &App, mut random: Random) -> Self {
        let panic_on_drop = (door.handler_kind == HandlerKind::Panicking && random.chance(100))
            .then(|| PanicOnDrop(Rc::clone(&app.armed), Rc::clone(&app.blown)));
        Self {
            door: Rc::clone(door),
            random,
            frames: 0,
            energy: 100,
            due: None,
            _panic_on_drop: panic_on_drop,
        }
    }

    fn misbehave(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        cx.app.work();
        match self.door.handler_kind {
            HandlerKind::Meddling if self.random.chance(100) => self.meddle(cx),
            HandlerKind::Posting if self.random.chance(200) => self.give_orders(cx),
            HandlerKind::Panicking if self.random.chance(30) => {
                cx.app.panics += 1;
                blow()
            }
            HandlerKind::Suicidal if self.random.chance(150) => return self.end_itself(cx),
            HandlerKind::Managing if self.random.chance(300) => return self.manage(cx),
            _ => {}
        }
        Ok(())
    }

    fn meddle(&mut self, cx: &mut Context<'_, App>) {
        let Some(&(other, _)) = self.random.pick(&cx.app.members) else {
            return;
        };
        let action = self.random.below(12);
        if action == 10 {
            let length = self.random.between(1, 250);
            return cx.app.broadcast(&mut cx.conn, &vec![b'm'; length]);
        }
        let successor = Self::new(&self.door, cx.app, Random::new(self.random.bits()));
        let Some(mut neighbour) = cx.conn.peer(other) else {
            return cx.app.blame("a member has gone without on_close");
        };
        match action {
            0 => neighbour.close(),
            1 => neighbour.abort(),
            2 => cx.app.pause(&mut neighbour, true),
            3 => cx.app.pause(&mut neighbour, false),
            4 => neighbour.set_timer(9, Duration::from_millis(5)),
            5 => neighbour.close_after_input(),
            6 => drop(cx.app.order(Order::Kill(other))),
            7 => neighbour.replace_handler(ScriptedHandler::successor(successor)),
            8 => neighbour.end(Close::because("meddled with")),
            // It may be closing, or full: both are results.
            _ => drop(cx.app.send(&mut neighbour, b"meddling")),
        }
    }

    fn give_orders(&mut self, cx: &mut Context<'_, App>) {
        let count = if self.random.chance(100) { 50 } else { 1 };
        for _ in 0..count {
            if self.energy == 0 {
                return;
            }
            self.energy -= 1;
            // To itself, or to another connection.
            let own = (
                cx.conn.id(),
                tcp(&cx.conn.info().expect("it is there").peer),
            );
            let &(id, peer) = self.random.pick(&cx.app.members).unwrap_or(&own);
            let id = if self.random.chance(500) {
                own
            } else {
                (id, peer)
            };
            let order = draw_order(&mut self.random, id);
            cx.app.order(order);
        }
    }

    /// Asks and changes the server, within its callback.
    fn manage(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        let own = cx.conn.id();
        let (other, _) = *self.random.pick(&cx.app.members).unwrap_or(&(own, NOWHERE));
        match self.random.below(12) {
            0 => notify(cx, own),
            1 => {
                notify(cx, own);
                return Err(Close::because("behind its own message"));
            }
            2 => {
                notify(cx, other);
                if let Some(mut conn) = cx.conn.peer(other) {
                    match self.random.below(4) {
                        0 => conn.close(),
                        1 => conn.end(Close::because("behind a message")),
                        2 => conn.close_after_input(),
                        _ => conn.abort(),
                    }
                }
                notify(cx, other);
            }
            3 => {
                let killed = cx.conn.control().kill(other);
                cx.app.commands.kills += u64::from(killed);
            }
            4..=5 => {
                let after = Duration::from_millis(self.random.below(50) as u64);
                let mut control = cx.conn.control();
                let timer = control.set_timer(after, move |app: &mut App, control| {
                    app.work();
                    if let Some(mut conn) = control.conn(other) {
                        // It may be closing, or full: both are results.
                        let _ = app.send(&mut conn, b"in time");
                    }
                });
                if self.random.chance(300) && !control.cancel_timer(timer) {
                    cx.app.blame("a timer that is set cannot be cancelled");
                }
            }
            6 => {
                let control = cx.conn.control();
                let (stats, all) = (control.stats(), control.connections());
                let drawn = control.tree(4).to_string() + &control.metrics().to_string();
                // The last callback of a connection that is counted no more.
                let counted = [stats.open, stats.open + 1];
                if !counted.contains(&all.len()) || drawn.is_empty() {
                    cx.app.blame("the controls do not list all connections");
                }
            }
            7..=8 => descriptors::watch(cx, other, &mut self.random),
            9 => descriptors::detach(cx, &self.door),
            _ => notify(cx, other),
        }
        Ok(())
    }

    fn end_itself(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        let id = cx.conn.id();
        match self.random.below(11) {
            0 => cx.conn.close(),
            1 => cx.conn.abort(),
            2 => return Err(Close::new()),
            3 => return Err(Close::abort()),
            4 => return Err(Close::because("had enough")),
            5 => drop(cx.app.order(Order::Kill(id))),
            6 => cx.conn.close_after_input(),
            10 => cx.conn.end(Close::because("had enough of it")),
            7 => {
                cx.app.panics += 1;
                blow()
            }
            8 => {
                cx.conn.close();
                cx.conn.close();
                cx.conn.abort();
            }
            _ => {
                cx.conn.close();
                if !matches!(cx.conn.send(b"late"), Err(SendError::Closed)) {
                    cx.app.blame("a send was taken after close");
                }
            }
        }
        Ok(())
    }

    fn shift(&mut self, cx: &mut Context<'_, App>) {
        let wire = Wire::ALL[self.random.below(Wire::ALL.len())];
        cx.app.set_framing(&mut cx.conn, wire);
    }

    fn upgrade(&mut self, cx: &mut Context<'_, App>) {
        let talk = cx.app.talk(tcp(&cx.conn.info().expect("it is there").peer));
        let all_heard = talk.heard == talk.said.len();
        if all_heard || self.random.chance(20) {
            #[cfg(feature = "tls")]
            cx.app.start_tls(&mut cx.conn);
            if self.random.chance(300) {
                // Behind the handshake. It may be full, which is a result.
                let _ = cx.app.send(&mut cx.conn, b"early");
            }
        }
    }

    /// Sends until it is refused.
    fn flood(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        let plain = !self.door.tls;
        while self.energy > 0 {
            self.energy -= 1;
            match cx.app.send(&mut cx.conn, FLOOD) {
                // The socket is written first, so that the queue before does not matter.
                Ok(()) => {
                    let limit = cx.conn.config().expect("it is there").output_limit;
                    if plain && cx.conn.queued() >= limit + FLOOD.len() + 8 {
                        cx.app.blame("taken above the limit");
                    }
                }
                Err(SendError::Full { queued, limit }) if queued >= limit => return Ok(()),
                Err(SendError::Closed) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// A random action of an owner of a handle.
pub fn draw_order(random: &mut Random, (id, peer): (ConnId, SocketAddr)) -> Order {
    match random.below(100) {
        0..=9 => Order::Send(id, peer),
        10..=34 => Order::Notify(id),
        35..=36 => Order::Kill(id),
        37..=39 => Order::Widen(id, peer),
        40..=66 => Order::Talk(id),
        67..=68 => Order::Cap(random.below(10)),
        69..=80 => Order::Chain(random.below(4) as u8),
        81..=84 => Order::Panic,
        _ => Order::Idle,
    }
}

/// The peer of no connection.
const NOWHERE: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

/// Gives a message to a connection of the same thread.
fn notify(cx: &mut Context<'_, App>, to: ConnId) {
    let Some(mut conn) = cx.conn.peer(to) else {
        return;
    };
    match conn.notify(Rc::new("noted")) {
        Ok(()) => cx.app.commands.notifies += 1,
        // It closes, or too many wait: both are results.
        Err(HandleError::NoConnection(_) | HandleError::QueueFull) => {}
        Err(error) => cx.app.blame(error.to_string()),
    }
}

/// A frame of a flood.
const FLOOD: &[u8] = b"a flood of words";

impl Play<App> for Subject {
    /// The books come first, then mischief.
    fn play(&mut self, cx: &mut Context<'_, App>, call: Call<'_>) -> Outcome {
        self.note(cx, &call);
        self.misbehave(cx)?;
        match call {
            Call::Open => self.open(cx)?,
            Call::Frame(frame) => self.answer(cx, frame)?,
            // It may be full, which is a result.
            Call::BadInput(_) => drop(cx.app.send(&mut cx.conn, b"bad")),
            Call::Secured => cx.app.send(&mut cx.conn, b"secured")?,
            Call::Finish => match self.door.handler_kind {
                HandlerKind::Stubborn => {}
                HandlerKind::Halving => cx.conn.finish(),
                _ => cx.conn.close(),
            },
            Call::Writable if self.door.handler_kind == HandlerKind::Flooding => self.flood(cx)?,
            Call::Timer(_) => self.go_on(cx),
            Call::Drain if self.door.handler_kind != HandlerKind::Stubborn => {
                cx.conn.close_after_input()
            }
            Call::Close(_) if self.door.handler_kind == HandlerKind::Clinging => {
                self.say_farewell(cx)
            }
            _ => {}
        }
        Ok(())
    }
}

impl Subject {
    fn note(&mut self, cx: &mut Context<'_, App>, call: &Call<'_>) {
        let (id, peer) = (
            cx.conn.id(),
            tcp(&cx.conn.info().expect("it is there").peer),
        );
        match call {
            Call::Open => {
                cx.app.members.push((id, peer));
                let talk = cx.app.talk(peer);
                if std::mem::replace(&mut talk.opened, true) || talk.failed_accept.is_some() {
                    cx.app.blame("opened twice, or after its end");
                }
            }
            Call::Frame(frame) => {
                if let Err(fault) = cx.app.talk(peer).hear(frame) {
                    cx.app.blame(fault);
                }
                self.frames += 1;
            }
            Call::BadInput(closed) => {
                let talk = cx.app.talk(peer);
                if talk.bad_input.replace(closed.reason).is_some() {
                    cx.app.blame("told twice that its input is bad");
                }
                if (closed.reason == CloseReason::BadFrame) != closed.error.is_some() {
                    cx.app.blame("bad input without a cause");
                }
            }
            Call::Secured if cx.conn.state() != State::Open => cx.app.blame("secured and not open"),
            Call::Flushed => {
                let bytes_out = cx.conn.info().map_or(0, |info| info.traffic.bytes_out);
                cx.app.note_flushed(peer, bytes_out);
            }
            Call::Message(_) => cx.app.commands.messages += 1,
            Call::Timer(1) => cx.app.note_fired(self.due.take()),
            Call::Close(closed) => {
                cx.app.members.retain(|&(member, _)| member != id);
                let talk = cx.app.talk(peer);
                if !talk.opened || talk.closed.replace(closed.reason).is_some() {
                    cx.app.blame("closed twice, or never opened");
                }
                if let Some(info) = cx.conn.info() {
                    let talk = cx.app.talk(tcp(&info.peer));
                    let judged = talk.judge_end(closed.reason, info.traffic.bytes_out);
                    if closed.reason == CloseReason::Detached {
                        talk.taken += info.traffic.bytes_out;
                    }
                    judged.unwrap_or_else(|fault| cx.app.blame(fault));
                }
            }
            Call::ConnectFailed(closed) => {
                cx.app.failed_accepts += 1;
                let talk = cx.app.talk(peer);
                if talk.opened || talk.failed_accept.replace(closed.reason).is_some() {
                    cx.app.blame("it failed to connect twice, or after it had");
                }
            }
            _ => {}
        }
    }

    fn set_timer(&mut self, cx: &mut Context<'_, App>, after: Duration) {
        self.due = cx.app.due(after);
        cx.conn.set_timer(1, after);
    }

    fn open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        match self.door.handler_kind {
            HandlerKind::Flooding => self.flood(cx)?,
            HandlerKind::Ticking => self.set_timer(cx, Duration::ZERO),
            HandlerKind::Halving if self.random.chance(300) => cx.conn.finish(),
            HandlerKind::Sleeping if self.random.chance(100) => cx.app.pause(&mut cx.conn, true),
            HandlerKind::Shifting => {
                let after = Duration::from_millis(self.random.below(200) as u64);
                self.set_timer(cx, after);
            }
            _ => {}
        }
        Ok(())
    }

    fn answer(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
        match cx.app.send(&mut cx.conn, frame) {
            Err(SendError::Closed) if self.door.handler_kind == HandlerKind::Halving => {}
            sent => sent?,
        }
        match self.door.handler_kind {
            HandlerKind::Halving if self.frames == 2 => cx.conn.finish(),
            HandlerKind::Pausing => {
                cx.app.pause(&mut cx.conn, true);
                let after = Duration::from_millis(self.random.below(20) as u64);
                self.set_timer(cx, after);
            }
            HandlerKind::Starttls if self.frames == 1 => {
                cx.app.pause(&mut cx.conn, true);
                self.set_timer(cx, Duration::from_millis(3));
            }
            HandlerKind::Sleeping if self.random.chance(300) => cx.app.pause(&mut cx.conn, true),
            HandlerKind::Brief if self.frames >= 3 => cx.conn.close(),
            HandlerKind::Shifting if self.frames % 2 == 0 => {
                self.shift(cx);
                if self.random.chance(300) {
                    let limits = ConnLimits::draw(&mut self.random, false);
                    let max = self.random.between(8, 255);
                    cx.app
                        .reconfigure(&mut cx.conn, max, |conn| limits.set(conn));
                }
            }
            HandlerKind::Flooding => self.flood(cx)?,
            HandlerKind::Upgrading if self.door.may_upgrade => self.upgrade(cx),
            _ => {}
        }
        Ok(())
    }

    /// A timer.
    fn go_on(&mut self, cx: &mut Context<'_, App>) {
        match self.door.handler_kind {
            HandlerKind::Shifting => self.shift(cx),
            HandlerKind::Starttls => {
                self.shift(cx);
                if self.random.chance(500) {
                    // It may be full, which is a result.
                    let _ = cx.app.send(&mut cx.conn, b"x");
                }
            }
            HandlerKind::Ticking if self.energy > 0 => {
                self.energy -= 1;
                self.set_timer(cx, Duration::ZERO);
            }
            // Others may have set it.
            HandlerKind::Sleeping => return,
            _ => {}
        }
        cx.app.pause(&mut cx.conn, false);
    }

    fn say_farewell(&mut self, cx: &mut Context<'_, App>) {
        if !matches!(cx.conn.send(b"to myself"), Err(SendError::Closed)) {
            cx.app.blame("a send was taken in on_close");
        }
        cx.app.pause(&mut cx.conn, false);
        cx.conn.set_timer(1, Duration::ZERO);
        for (other, _) in cx.app.members.clone() {
            if let Some(mut neighbour) = cx.conn.peer(other) {
                let _ = cx.app.send(&mut neighbour, b"farewell");
                if self.random.chance(50) {
                    neighbour.abort();
                }
            }
        }
    }
}

/// A listener's rules as they are, and how often they have changed.
#[derive(Clone, Debug)]
pub struct Live {
    pub rules: Rules,
    pub epoch: u64,
}

/// The service of one listener.
pub struct TestService {
    door: Rc<Door>,
    live: Rc<RefCell<Live>>,
    random: Random,
}

impl TestService {
    pub fn new(door: &Rc<Door>, live: &Rc<RefCell<Live>>, random: Random) -> Self {
        Self {
            door: Rc::clone(door),
            live: Rc::clone(live),
            random,
        }
    }

    fn panics(&mut self) -> bool {
        self.door.handler_kind == HandlerKind::Panicking && self.random.chance(50)
    }
}

impl Service<App> for TestService {
    fn accept(&mut self, app: &mut App, peer: Peer) -> Result<Box<dyn Handler<App>>, Refuse> {
        let live = self.live.borrow();
        let introduced = app
            .talk(tcp(&peer.addr))
            .introduce(&peer, &live.rules, live.epoch);
        drop(live);
        introduced.unwrap_or_else(|fault| app.blame(fault));
        app.work();
        if self.panics() {
            app.panics += 1;
            blow();
        }
        if self.random.chance(self.door.refusals) {
            if self.random.chance(500) {
                return Err(Refuse::silently());
            }
            let talk = app.talk(tcp(&peer.addr));
            talk.refused = true;
            talk.promised = b"go away\n".to_vec();
            return Err(Refuse::with_farewell("go away\n"));
        }
        let random = Random::new(self.random.bits());
        Ok(Box::new(ScriptedHandler::new(Subject::new(
            &self.door, app, random,
        ))))
    }

    fn on_failed_accept(&mut self, app: &mut App, peer: &Peer, closed: &Closed) {
        app.failed_accepts += 1;
        let live = self.live.borrow();
        let is_full = matches!(
            closed.reason,
            CloseReason::AtCapacity | CloseReason::RateLimited
        );
        let farewell = match &live.rules.at_capacity {
            AtCapacity::Refuse { farewell } if is_full => farewell.clone(),
            _ => Vec::new(),
        };
        app.talk(tcp(&peer.addr)).promised.extend(farewell);
        let bans = std::mem::take(&mut app.bans);
        let talk: &mut Talk = app.talk(tcp(&peer.addr));
        let judged = talk.judge_failed_accept(closed.reason, peer, &live.rules, live.epoch, &bans);
        app.bans = bans;
        drop(live);
        judged.unwrap_or_else(|fault| app.blame(fault));
        // A client over its source's limit may have had a slot or not.
        if peer.id.is_none() || closed.reason == CloseReason::SourceLimited {
            app.turned_away.0 += 1;
            *app.turned_away.1.entry(peer.listener).or_default() += 1;
        }
        let talk: &mut Talk = app.talk(tcp(&peer.addr));
        if talk.failed_accept.replace(closed.reason).is_some() || talk.opened {
            app.blame("ended twice, or opened before");
        }
        if self.panics() {
            app.panics += 1;
            blow();
        }
    }

    fn on_listener_lost(&mut self, app: &mut App, _: ListenerId, _: &std::io::Error) {
        app.lost_listeners += 1;
    }
}

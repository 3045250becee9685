//! What the handlers of one world share, and the account they keep of each client.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use portcullis::sim::Random;
use portcullis::{
    Addr, CloseReason, Conn, ConnConfig, ConnId, Handle, HandleError, ListenerId, Peer,
    ProxyProtocol, SendError, State,
};

use super::bans::Bans;
use super::descriptors::Descriptors;
use super::header::Opening;
use super::rules::Rules;
use super::sim_client::SimClient;
use super::wire::Wire;

/// The application.
#[derive(Debug)]
pub struct App {
    pub talks: BTreeMap<SocketAddr, Talk>,
    /// Open connections, by place.
    pub members: Vec<(ConnId, SocketAddr)>,
    /// Refused clients: all, and by listener.
    pub turned_away: (u64, BTreeMap<ListenerId, u64>),
    /// The server's own handle, for handlers that post to it.
    pub handle: Option<Handle<App>>,
    pub commands: Commands,
    /// Frames that handlers and jobs have sent.
    pub frames: u64,
    pub bans: Bans,
    pub descriptors: Descriptors,
    pub failed_accepts: u64,
    /// Jobs and services that panicked as planned.
    pub panics: u64,
    /// Destructors that did.
    pub blown: Rc<Cell<u64>>,
    pub lost_listeners: u64,
    /// The first thing that should not have happened.
    pub fault: Option<String>,
    /// Destructors may panic: not those of a world that is taken down.
    pub armed: Rc<Cell<bool>>,
    /// In worlds with slow callbacks.
    pub slow: Option<Slow>,
    /// For how long slow callbacks have blocked the loop so far.
    pub blocked: Duration,
}

/// Callbacks that take time now and then, whatever else they do.
pub struct Slow {
    pub work: Box<dyn Fn(Duration)>,
    pub random: Random,
    /// A callback has taken time since this was last taken back.
    pub has_worked: bool,
    /// No later than the server's clock.
    pub now: Duration,
    /// When the timers were due that have fired and are not judged yet.
    pub fired: Option<Duration>,
}

impl fmt::Debug for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slow").finish_non_exhaustive()
    }
}

impl App {
    /// The time outside of the server, between two things that happen.
    pub fn set_now(&mut self, now: Duration) {
        self.bans.set_now(now);
        if let Some(slow) = &mut self.slow {
            slow.now = now;
        }
    }

    /// When a timer is due that is set now; known in a world with slow callbacks.
    pub fn due(&self, after: Duration) -> Option<Duration> {
        Some(self.slow.as_ref()?.now.saturating_add(after))
    }

    /// A timer fires that was due then.
    pub fn note_fired(&mut self, due: Option<Duration>) {
        if let Some(slow) = &mut self.slow {
            slow.fired = slow.fired.max(due);
        }
    }

    /// Blocks the loop, in a world with slow callbacks.
    pub fn work(&mut self) {
        if let Some(slow) = &mut self.slow {
            if slow.random.chance(20) {
                let millis = slow.random.between(1, 4_000) as u64;
                let span = Duration::from_millis(millis);
                (slow.work)(span);
                slow.has_worked = true;
                self.blocked += span;
                slow.now += span;
            }
        }
    }
}

/// What the queue took, and what came out of it.
#[derive(Debug, Default)]
pub struct Commands {
    pub sends: u64,
    pub notifies: u64,
    pub kills: u64,
    pub posts: u64,
    pub refused: u64,
    /// Messages that arrived.
    pub messages: u64,
    /// Jobs that ran.
    pub jobs: u64,
}

/// One client's conversation, as both sides must see it.
#[derive(Debug)]
pub struct Talk {
    /// How the server cuts the stream now, and the longest payload it takes.
    pub wire: Wire,
    pub max: usize,
    pub tls: bool,
    /// Its handler has begun to upgrade it to TLS, when so much was promised in the clear.
    pub upgraded_at: Option<usize>,
    /// What it begins with, before TLS, and how much of that it has sent.
    pub opening: Opening,
    pub opening_sent: usize,
    /// How often its listener's rules had changed when it came.
    pub epoch: u64,
    /// When it came, and how many bans there had been.
    pub came: Duration,
    pub bans: usize,
    /// The service has been asked for a handler, with this source; not judged yet.
    pub asked: Option<IpAddr>,
    /// It may be evicted while it is open.
    pub evictable: bool,
    /// It is read no faster than its listener's rates say.
    pub throttled: bool,
    /// What the client has said, TLS taken off. What it began with is a part of that, but over TLS.
    pub said: Vec<u8>,
    /// How much of it was delivered, and in how many frames.
    pub heard: usize,
    frames: usize,
    /// What was taken for the client, on the wire, TLS taken off.
    pub promised: Vec<u8>,
    /// How much of that was taken before the connection came back.
    pub taken: u64,
    /// Its handler is to be notified once so much of it has left to the kernel.
    pub flush: Option<usize>,
    /// Its handler, or another's, wants no frames.
    pub paused: bool,
    /// Number of pauses so far.
    pub pauses: u64,
    /// A frame was sent to it whose position in the order is unknown.
    pub murky: bool,
    pub opened: bool,
    pub closed: Option<CloseReason>,
    /// Its handler was told that no frame can be made of the input.
    pub bad_input: Option<CloseReason>,
    /// The service has told it to go away.
    pub refused: bool,
    /// It was gone before it was open.
    pub failed_accept: Option<CloseReason>,
}

impl Talk {
    pub fn new(wire: Wire, max: usize, tls: bool) -> Self {
        Self {
            wire,
            max,
            tls,
            opening: Opening::default(),
            opening_sent: 0,
            epoch: 0,
            came: Duration::ZERO,
            bans: 0,
            asked: None,
            evictable: true,
            throttled: false,
            upgraded_at: None,
            said: Vec::new(),
            heard: 0,
            frames: 0,
            promised: Vec::new(),
            taken: 0,
            flush: None,
            paused: false,
            pauses: 0,
            murky: false,
            opened: false,
            closed: None,
            bad_input: None,
            refused: false,
            failed_accept: None,
        }
    }

    /// The whole header has been sent, if it is to have one.
    fn has_introduced_itself(&self) -> bool {
        self.opening.says.is_some() && self.opening_sent == self.opening.bytes.len()
    }

    /// The service is asked about it: it may come in, with the header that it has sent and no other, and the next byte
    /// is the one behind that.
    pub fn introduce(&mut self, peer: &Peer, rules: &Rules, epoch: u64) -> Result<(), String> {
        let from = tcp(&peer.addr).ip();
        if !rules.admits(from) && self.epoch == epoch {
            return Err(format!("{from} may not come in"));
        }
        let says = self
            .opening
            .says
            .as_ref()
            .filter(|_| self.has_introduced_itself());
        let is_right = match (&peer.proxy, says) {
            (Some(header), Some(says)) => says.is(header),
            (Some(_), None) => false,
            // A header from an untrusted peer is the beginning of its stream.
            (None, Some(_)) => self.epoch != epoch || !rules.trusts(from),
            (None, None) => {
                let required = rules.trusts(from) && rules.proxy == ProxyProtocol::Required;
                self.epoch != epoch
                    || !(required || rules.trusts(from) && !self.opening.bytes.is_empty())
            }
        };
        if !is_right {
            return Err(format!(
                "{from} comes in with {:?} and says {says:?}",
                peer.proxy
            ));
        }
        // A header without an address counts as the proxy's own.
        let source = says
            .filter(|_| peer.proxy.is_some())
            .map(|says| says.source().unwrap_or(from));
        if source.is_some_and(|source| !rules.allows(source)) {
            return Err(format!("{source:?} may not come in"));
        }
        self.asked = Some(source.unwrap_or(from));
        // Or it was, when it came and its header had not: it keeps the rates that it came under.
        self.throttled = rules.has_throttle() || self.epoch != epoch;
        if peer.proxy.is_some() && !self.tls {
            self.heard = self.opening.bytes.len();
        }
        Ok(())
    }

    /// It does not come in, for this reason.
    pub fn judge_failed_accept(
        &self,
        reason: CloseReason,
        peer: &Peer,
        rules: &Rules,
        epoch: u64,
        bans: &Bans,
    ) -> Result<(), String> {
        let from = tcp(&peer.addr).ip();
        let says = self
            .opening
            .says
            .as_ref()
            .filter(|_| self.has_introduced_itself());
        let source = says.and_then(|says| says.source());
        let had_place = peer.id.is_some();
        let may_be_banned = |address| bans.may_deny(address, self.came);
        let wrong = match reason {
            CloseReason::Denied if may_be_banned(source.unwrap_or(from)) => false,
            CloseReason::Denied if !had_place && may_be_banned(from) => false,
            // It may have been judged by the rules of before.
            CloseReason::Denied | CloseReason::SourceLimited
                if had_place && self.epoch != epoch =>
            {
                false
            }
            CloseReason::Denied if had_place => rules.allows(source.unwrap_or(from)),
            CloseReason::Denied => rules.admits(from),
            CloseReason::BadProxyHeader => says.is_some(),
            CloseReason::SourceLimited => !rules.limits_sources(),
            CloseReason::ClosedEarly if had_place => self.opening_sent > 0 || !self.said.is_empty(),
            _ => false,
        };
        if wrong {
            return Err(format!(
                "{from} ended as {reason}: {peer:?}, {:?}",
                self.opening
            ));
        }
        Ok(())
    }

    /// A naive reader finds another frame in what was not delivered.
    pub fn has_more(&self) -> bool {
        let rest = &self.said[self.heard..];
        self.wire.cut(rest, self.max, rest.len()).is_some()
    }

    /// It ends for this reason, and the kernel has taken so many bytes for the client.
    pub fn judge_end(&self, reason: CloseReason, taken: u64) -> Result<(), String> {
        let taken = self.taken + taken;
        let (promised, unheard) = (self.promised.len() as u64, self.said.len() - self.heard);
        // The plaintext is unknown.
        if is_orderly(reason) && !self.murky && !self.tls && taken != promised {
            return Err(format!(
                "it ended as {reason}, with {taken} of {promised} bytes sent"
            ));
        }
        if reason == CloseReason::Finished && unheard > 0 {
            return Err(format!(
                "it ended as {reason}, with {unheard} bytes unheard"
            ));
        }
        let is_bad = matches!(reason, CloseReason::FrameTooLarge | CloseReason::BadFrame);
        if is_bad && self.bad_input != Some(reason) {
            return Err(format!(
                "it ended as {reason}, and its handler had no last word"
            ));
        }
        if self
            .bad_input
            .is_some_and(|bad| is_orderly(reason) && bad != reason)
        {
            return Err(format!("it ended as {reason}, after {:?}", self.bad_input));
        }
        // In the handshake of an upgrade it is evicted like any other in a handshake.
        let spoke = self.heard > self.opening.bytes.len() && self.upgraded_at.is_none();
        if reason == CloseReason::Evicted && spoke {
            return Err("it was evicted, and had sent a frame".to_owned());
        }
        if reason == CloseReason::Evicted && !self.evictable && self.upgraded_at.is_none() {
            return Err("it was evicted, and its listener evicts none".to_owned());
        }
        if is_in_the_stream(reason) && self.has_more() {
            return Err(format!("it ended as {reason}, and the next frame is whole"));
        }
        Ok(())
    }

    /// It comes back after it was detached, and opens once more.
    pub fn come_back(&mut self) {
        (self.opened, self.closed, self.flush) = (false, None, None);
        (self.paused, self.evictable) = (false, false);
    }

    /// The server delivers a frame: it must be what a naive reader finds next.
    pub fn hear(&mut self, frame: &[u8]) -> Result<(), String> {
        if let Some(reason) = self.bad_input {
            return Err(format!("the frame {frame:?} was delivered after {reason}"));
        }
        let rest = &self.said[self.heard..];
        let is_first = self.frames == 0 && !self.tls;
        if is_first && rest.starts_with(&SimClient::hello()) && !self.wire.takes_any_bytes() {
            return Err(format!(
                "the frame {frame:?} of a ClientHello was delivered"
            ));
        }
        match self.wire.cut(rest, self.max, frame.len()) {
            Some((payload, taken)) if self.wire.unpack(&rest[payload.clone()]) == frame => {
                self.heard += taken;
                self.frames += 1;
                Ok(())
            }
            found => Err(format!(
                "{:?}: the frame {frame:?} was delivered, a naive reader finds {found:?} in {rest:?}",
                self.wire
            )),
        }
    }
}

/// Ends that lose nothing of what was sent: FIN comes behind all of it.
pub fn is_orderly(reason: CloseReason) -> bool {
    matches!(
        reason,
        CloseReason::Finished
            | CloseReason::Closed
            | CloseReason::Failed
            | CloseReason::Panicked
            | CloseReason::Drained
            | CloseReason::FrameTimeout
            | CloseReason::IdleTimeout
            // At the frame timeout, for one.
            | CloseReason::UnexpectedTls
    ) || is_in_the_stream(reason)
}

/// Ends for which what comes next in the stream is the cause, and nothing that comes later can change it.
fn is_in_the_stream(reason: CloseReason) -> bool {
    matches!(
        reason,
        CloseReason::Truncated
            | CloseReason::FrameTooLarge
            | CloseReason::BadFrame
            | CloseReason::TlsTruncated
    )
}

/// The simulated kernel has no other addresses.
pub fn tcp(addr: &Addr) -> SocketAddr {
    addr.as_tcp().expect("a TCP address")
}

impl App {
    pub fn new() -> Self {
        Self {
            talks: BTreeMap::new(),
            members: Vec::new(),
            turned_away: Default::default(),
            handle: None,
            commands: Commands::default(),
            frames: 0,
            bans: Bans::default(),
            descriptors: Descriptors::default(),
            failed_accepts: 0,
            panics: 0,
            blown: Rc::default(),
            lost_listeners: 0,
            fault: None,
            armed: Rc::new(Cell::new(true)),
            slow: None,
            blocked: Duration::ZERO,
        }
    }

    pub fn blame(&mut self, what: impl Into<String>) {
        self.fault.get_or_insert(what.into());
    }

    /// The conversation with this peer. Clients that the world does not know do not exist.
    pub fn talk(&mut self, peer: SocketAddr) -> &mut Talk {
        self.talks
            .entry(peer)
            .or_insert_with(|| Talk::new(Wire::Raw, 0, false))
    }

    /// Sends, and takes down what the client must get.
    pub fn send(&mut self, conn: &mut Conn<'_, Self>, payload: &[u8]) -> Result<(), SendError> {
        let (front, back) = payload.split_at(payload.len() / 3);
        let sent = match self.frames % 5 {
            0 => conn.send(payload),
            1 => conn.send(payload.to_vec()),
            2 => conn.send(Arc::<[u8]>::from(payload)),
            3 => conn.send((front, Arc::<[u8]>::from(back))),
            _ => conn.send_with(|out| {
                out.put(front);
                out.put(back);
                Ok(())
            }),
        };
        if sent.is_ok() {
            self.frames += 1;
            let notify = self.frames % 7 == 0;
            let talk = self.talk(tcp(&conn.info().expect("it is there").peer));
            talk.promised.extend(talk.wire.encode(payload));
            if notify {
                talk.flush = Some(talk.promised.len());
                conn.notify_flushed();
            }
        }
        sent
    }

    /// Sends to all members, and takes down what each client must get.
    pub fn broadcast(&mut self, conn: &mut Conn<'_, Self>, payload: &[u8]) {
        let members = self.members.clone();
        let frames_out = |conn: &mut Conn<'_, Self>| {
            let mut frames = |id| Some(conn.peer(id)?.info()?.traffic.frames_out);
            let all = members.iter().map(|&(id, _)| frames(id));
            all.collect::<Vec<_>>()
        };
        let before = frames_out(conn);
        let ids = members.iter().map(|&(id, _)| id);
        let done = conn.broadcast(ids, Arc::<[u8]>::from(payload));
        let (mut sent, after) = (0, frames_out(conn));
        for (at, &(_, peer)) in members.iter().enumerate() {
            if before[at] != after[at] {
                let talk = self.talk(peer);
                talk.promised.extend(talk.wire.encode(payload));
                sent += 1;
            }
        }
        self.frames += sent as u64;
        if (done.sent, done.sent + done.gone + done.refused.len()) != (sent, members.len()) {
            self.blame(format!(
                "{sent} of {} took a frame: {done:?}",
                members.len()
            ));
        }
    }

    /// The handler is notified that output has left to the kernel.
    pub fn note_flushed(&mut self, peer: SocketAddr, bytes_out: u64) {
        let talk = self.talk(peer);
        match talk.flush.take() {
            None => self.blame("flushed without a request"),
            Some(at) if !talk.tls && talk.taken + bytes_out < at as u64 => {
                self.blame(format!("flushed at {bytes_out} of {at} bytes"));
            }
            Some(_) => {}
        }
    }

    pub fn pause(&mut self, conn: &mut Conn<'_, Self>, on: bool) {
        let talk = self.talk(tcp(&conn.info().expect("it is there").peer));
        talk.paused = on;
        talk.pauses += u64::from(on);
        if on {
            conn.pause();
        } else {
            conn.resume();
        }
    }

    /// Upgrades a plain connection, once: in order if nothing is under way to the server, else that fails the handshake.
    #[cfg(feature = "tls")]
    pub fn start_tls(&mut self, conn: &mut Conn<'_, Self>) {
        if conn.start_tls(crate::sim_tls::server_config()).is_ok() {
            let talk = self.talk(tcp(&conn.info().expect("it is there").peer));
            talk.tls = true;
            talk.upgraded_at = Some(talk.promised.len());
            talk.murky |= talk.said.len() > talk.heard;
        }
    }

    /// Changes the framing, in both accounts.
    pub fn set_framing(&mut self, conn: &mut Conn<'_, Self>, wire: Wire) {
        conn.set_framing(&wire.framing());
        self.talk(tcp(&conn.info().expect("it is there").peer)).wire = wire;
    }

    /// Changes a connection's options, and the maximum frame in both accounts. A connection that
    /// is not open refuses.
    pub fn reconfigure(
        &mut self,
        conn: &mut Conn<'_, Self>,
        max: usize,
        change: impl FnOnce(&mut ConnConfig),
    ) {
        let is_open = conn.state() == State::Open;
        let changed = conn.reconfigure(|options| {
            change(options);
            options.max_frame = Some(max);
        });
        let talk = self.talk(tcp(&conn.info().expect("it is there").peer));
        if changed.is_ok() {
            talk.max = max;
        }
        let is_good = max >= 2 || talk.wire != Wire::Pairs;
        if changed.is_ok() != (is_open && is_good) {
            self.blame("the options change while it is open, to good ones, and only then");
        }
    }
}

/// A request to the server through its handle.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// A frame, at an unknown position in the order. The connection, and its peer.
    Send(ConnId, SocketAddr),
    Notify(ConnId),
    Kill(ConnId),
    /// A job that sends, in a known order.
    Talk(ConnId),
    /// A job that changes the longest frame of a connection, open or not.
    Widen(ConnId, SocketAddr),
    Cap(usize),
    /// A job that posts a job that posts a job.
    Chain(u8),
    Panic,
    /// Nothing, as jobs go.
    Idle,
}

impl Commands {
    /// Orders that the queue took.
    pub fn taken(&self) -> u64 {
        self.sends + self.notifies + self.kills + self.posts
    }
}

impl App {
    /// What is sent through the handle.
    pub const FOREIGN: &'static str = "foreign";

    /// Gives an order through the handle; false if the queue is full. From a handler, or from another thread.
    pub fn order(&mut self, order: Order) -> bool {
        let Some(handle) = self.handle.clone() else {
            return false;
        };
        let (outcome, count) = match order {
            Order::Send(id, peer) => {
                self.talk(peer).murky = true;
                (handle.send(id, Self::FOREIGN), &mut self.commands.sends)
            }
            Order::Notify(id) => (handle.notify(id, "noted"), &mut self.commands.notifies),
            Order::Kill(id) => (handle.kill(id), &mut self.commands.kills),
            order => (post(&handle, order), &mut self.commands.posts),
        };
        match outcome {
            Ok(()) => *count += 1,
            Err(HandleError::QueueFull) => {
                self.commands.refused += 1;
                return false;
            }
            // It has gone, and the handle knows.
            Err(HandleError::NoConnection(_)) => {}
            Err(error) => self.blame(format!("{order:?}: {error}")),
        }
        true
    }
}

fn post(handle: &Handle<App>, order: Order) -> Result<(), HandleError> {
    handle.post(move |app, control| {
        app.commands.jobs += 1;
        app.work();
        match order {
            Order::Talk(id) => {
                if let Some(mut conn) = control.conn(id) {
                    // It may be closing, or full: both are results.
                    let _ = app.send(&mut conn, b"posted");
                }
            }
            Order::Widen(id, peer) => {
                let conn = control.conn(id);
                if let Some(mut conn) = conn {
                    // Never to less: what is held already may be more.
                    let max = app.talk(peer).max.max(255);
                    app.reconfigure(&mut conn, max, |_| {});
                }
            }
            // A small number is never too many.
            Order::Cap(connections) => {
                drop(control.reconfigure(|config| config.max_connections = connections))
            }
            Order::Chain(more) if more > 0 => {
                app.order(Order::Chain(more - 1));
            }
            Order::Panic => {
                app.panics += 1;
                crate::planned::blow();
            }
            _ => {}
        }
    })
}

//! The configuration of a world, a byte or so for each option.

use std::time::Duration;

use kit::planned::blow;
use kit::script::ScriptedHandler;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use portcullis::sim::{Faults, Random};
use portcullis::{
    AccessRules, AtCapacity, CloseReason, Config, Framing, Listen, Peer, ProxyProtocol, Quota,
    Rate, Refuse, Service,
};

use crate::framing::framing;
use crate::subject::{tcp, App, Subject};

const FULL: &[u8] = b"full\n";
const UNWANTED: &[u8] = b"not you\n";

/// All zero is a server as most are.
#[derive(Arbitrary, Debug)]
pub struct Setup {
    /// From 224 on there are rates, and limits on sources and on pending connections; from 240 on
    /// one on memory.
    pub seed: u8,
    /// Faults at random, besides those of the script: from 192 on.
    faults: u8,
    framings: [u8; 2],
    /// What is sent is put in a frame of the listener's framing first, if even. The other bits limit what most servers
    /// leave alone: see [`Setup::min_rate`], [`Setup::work`] and [`Setup::evicts_silent`].
    whole_frames: u8,
    max_frame: u8,
    cap: u8,
    /// Of the second listener.
    own_cap: u8,
    /// Each listener refuses at its cap, if odd; from 128 on it is behind a proxy, from 192 on one that may be left out. The
    /// header comes in two pieces if the next but one bit is set.
    refuse: [u8; 2],
    watermarks: [u8; 3],
    timeouts: [u8; 5],
    budgets: [u8; 3],
    queue: [u8; 2],
    emfile_backoff: u8,
    linger_bytes: u8,
    backlog: u8,
    /// What a service says to its clients, one after the other: see [`TestService::door`].
    doors: [u8; 3],
    /// The server is dropped in the middle of everything, from 240 on.
    abrupt: u8,
}

impl Setup {
    pub fn faults(&self) -> Faults {
        match self.faults {
            0..=191 => Faults::none(),
            seed => Faults::swarm(&mut Random::new(u64::from(seed))),
        }
    }

    pub fn is_abrupt(&self) -> bool {
        self.abrupt >= 240
    }

    pub fn config(&self) -> Config {
        let [accept, read, jobs] = self.budgets.map(|byte| amount(!byte).max(1));
        let mut config = Config::max_connections(usize::from(16 - self.cap % 17));
        if self.has_limits() {
            config.accept_rate = Some(Rate::per_second(100).burst(3));
            config.pending_limits.connections = Quota::Count(2);
            config.pending_limits.grace = Duration::from_millis(100);
            config.memory_limit = self.limits_memory().then_some(1 << 20);
        }
        config.budgets.accepts = accept;
        config.budgets.read_bytes = read;
        config.budgets.commands = jobs;
        config.budgets.work = self.work(config.budgets.work);
        config.queue_limits.commands = amount(!self.queue[0]).max(1);
        config.queue_limits.bytes = amount(!self.queue[1]);
        config.emfile_backoff = Duration::from_millis(500 + 10 * u64::from(self.emfile_backoff));
        config
    }

    pub fn listen(&self, which: usize) -> Listen {
        let [low, more, most] = self.watermarks;
        let (low, high) = (amount(low), amount(low) + 1 + amount(!more));
        let [handshake, frame, idle, write, linger] = self.timeouts.map(time);
        let mut listen = Listen::tcp("127.0.0.1:0", self.framing(which));
        let conn = &mut listen.conn;
        conn.low_watermark = low;
        conn.high_watermark = high;
        conn.output_limit = high + amount(!most);
        conn.handshake_timeout = handshake;
        conn.frame_timeout = frame;
        conn.idle_timeout = idle;
        conn.write_timeout = write;
        conn.linger_timeout = linger.min(Duration::from_secs(20));
        conn.linger_bytes = amount(!self.linger_bytes);
        conn.min_rate = self.min_rate(conn.min_rate);
        listen.socket.backlog = u32::from(!self.backlog);
        listen.evict_silent = self.evicts_silent();
        if let bytes @ 1.. = amount(self.max_frame) {
            listen.conn.max_frame = Some(match self.framing(which) {
                Framing::Fixed(length) => bytes.max(length as usize),
                _ => bytes,
            });
        }
        if self.refuse[which] % 2 == 1 {
            listen.at_capacity = AtCapacity::Refuse {
                farewell: FULL.to_vec(),
            };
        }
        if self.has_limits() {
            listen.conn.frame_rate = Some(Rate::per_second(10_000).burst(10));
            listen.accept_rate = Some(Rate::per_second(50).burst(2));
            listen.source_limits.connections = Some(5);
            listen.total_read_rate = Some(Rate::per_second(1_000_000).burst(1000));
        }
        if let Some(mode) = self.proxy(which) {
            listen.proxy_protocol = mode;
            listen.trusted_proxies = Some(AccessRules::allow_all());
        }
        if which == 1 {
            listen = listen.name("second");
            listen.max_connections = Some(usize::from(!self.own_cap));
        }
        listen
    }

    fn min_rate(&self, default: u32) -> u32 {
        match self.whole_frames >> 1 & 3 {
            0 => default,
            1 => 1,
            2 => 100_000,
            _ => u32::MAX,
        }
    }

    /// The budget of a whole iteration.
    fn work(&self, default: usize) -> usize {
        match self.whole_frames >> 3 & 3 {
            0 => default,
            1 => 1,
            2 => 1000,
            _ => 100_000,
        }
    }

    fn evicts_silent(&self) -> bool {
        self.whole_frames & 32 == 0
    }

    fn has_limits(&self) -> bool {
        self.seed >= 224
    }

    /// Some connections may be paused for memory because others use too much.
    pub fn limits_memory(&self) -> bool {
        self.seed >= 240
    }

    fn proxy(&self, which: usize) -> Option<ProxyProtocol> {
        match self.refuse[which] {
            0..=127 => None,
            128..=191 => Some(ProxyProtocol::Required),
            192.. => Some(ProxyProtocol::Optional),
        }
    }

    /// What clients of that listener begin with: now, and before they say anything else.
    pub fn header(&self, which: usize) -> [&'static [u8]; 2] {
        const HEADER: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n";
        match self.proxy(which) {
            None => [b"", b""],
            Some(_) if self.refuse[which] & 4 == 0 => [HEADER, b""],
            Some(_) => [&HEADER[..9], &HEADER[9..]],
        }
    }

    fn framing(&self, which: usize) -> Framing {
        framing(self.framings[which])
    }

    pub fn test_service(&self) -> TestService {
        TestService {
            doors: self.doors,
            visitors: 0,
        }
    }

    /// These bytes as a client of that listener puts them on the wire.
    pub fn wire(&self, which: usize, bytes: &[u8]) -> Vec<u8> {
        if self.whole_frames % 2 == 1 {
            return bytes.to_vec();
        }
        let framing = self.framing(which);
        let most = match framing {
            Framing::Packet1 => 0xFF,
            _ => 0xFFFF - 3,
        };
        let bytes = &bytes[..bytes.len().min(most)];
        let header = (bytes.len() as u32).to_be_bytes();
        match framing {
            Framing::Packet1 => [&header[3..], bytes].concat(),
            Framing::Packet2 => [&header[2..], bytes].concat(),
            Framing::Packet4 => [&header, bytes].concat(),
            Framing::Line => [bytes, b"\n"].concat(),
            Framing::Delimited(delimiter) => [bytes, &[delimiter]].concat(),
            Framing::Fixed(length) => {
                let mut frames = bytes.to_vec();
                frames.resize(bytes.len().next_multiple_of(length as usize), 0);
                frames
            }
            Framing::LengthField { .. } => {
                let length = (bytes.len() as u16 + 3).to_le_bytes();
                [b"t", &length[..], bytes].concat()
            }
            _ => bytes.to_vec(),
        }
    }

    /// Nothing that [`Setup::wire`] makes is the beginning of a frame only.
    pub fn sends_whole_frames(&self, which: usize) -> bool {
        self.whole_frames % 2 == 0 || matches!(self.framing(which), Framing::Raw)
    }

    /// The framing of an echo puts back exactly what it took away.
    pub fn is_wire_its_own_echo(&self, which: usize) -> bool {
        !matches!(self.framing(which), Framing::Custom(_))
    }
}

/// 0 to a million, close together at first and ever further apart.
fn amount(byte: u8) -> usize {
    let (steps, size) = (usize::from(byte % 16), byte / 16);
    ((16 + steps) << size) - 16
}

/// What a client that was never open may have been told.
pub fn farewell(reason: CloseReason) -> &'static [u8] {
    match reason {
        CloseReason::AtCapacity | CloseReason::RateLimited => FULL,
        CloseReason::Refused => UNWANTED,
        _ => b"",
    }
}

fn time(byte: u8) -> Duration {
    match byte {
        0 => Duration::MAX,
        byte => Duration::from_millis(amount(byte) as u64),
    }
}

pub struct TestService {
    doors: [u8; 3],
    visitors: usize,
}

enum Door {
    Open,
    Shut,
    ShutWithWords,
    Panic,
    /// Refuses, and panics when it is told of it.
    PanicLater,
}

impl TestService {
    fn door(&self) -> Door {
        match self.doors[self.visitors % self.doors.len()] {
            0..=191 => Door::Open,
            192..=207 => Door::Shut,
            208..=223 => Door::ShutWithWords,
            224..=239 => Door::Panic,
            240.. => Door::PanicLater,
        }
    }
}

impl Service<App> for TestService {
    fn accept(
        &mut self,
        _: &mut App,
        peer: Peer,
    ) -> Result<Box<dyn portcullis::Handler<App>>, Refuse> {
        self.visitors += 1;
        match self.door() {
            Door::Open => Ok(Box::new(ScriptedHandler::new(Subject::of(tcp(&peer.addr))))),
            Door::Shut | Door::PanicLater => Err(Refuse::silently()),
            Door::ShutWithWords => Err(Refuse::with_farewell(UNWANTED)),
            Door::Panic => blow(),
        }
    }

    fn on_failed_accept(&mut self, app: &mut App, peer: &Peer, closed: &portcullis::Closed) {
        let told = app.failed_accepts.insert(tcp(&peer.addr), closed.reason);
        assert!(told.is_none(), "{} was reported twice", peer.addr);
        if matches!(self.door(), Door::PanicLater) {
            blow();
        }
    }
}

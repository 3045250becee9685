//! Scenarios that are always the same, played again with each of their calls failing in turn, and each two of them
//! (SQLite's way of testing: Hipp, "How SQLite Is Tested", section 3).

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use portcullis::sim::{Call, ClientId, ClientState, Faults, Scripted, Sim, Violation};
use portcullis::{
    AccessRules, Close, Closed, Config, Context, Framing, Handler, Listen, ListenerId, Outcome,
    Peer, ProxyProtocol, Rate, Refuse, Service,
};

#[cfg(feature = "tls")]
use crate::sim_tls;

/// What a server lives through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// Two lines, and the end.
    Echo,
    /// The client finishes while most of the answers wait for it to read.
    HalfClose,
    /// The client reads a little now and then.
    SlowReader,
    /// The server drains with four clients: one is idle, one does not read, one does not finish,
    /// and one waits in the backlog.
    Drain,
    /// Descriptors for two clients, and four of them at two listeners.
    OutOfFds,
    /// Behind a proxy whose header comes in two pieces, with rates for connections, bytes and
    /// frames.
    Proxied,
    /// [`Scenario::Echo`] over TLS.
    #[cfg(feature = "tls")]
    Tls,
}

/// How often each call was made while it was played, in the order of [`Call::ALL`].
pub type Calls = Vec<u64>;

impl Scenario {
    pub const ALL: &'static [Self] = &[
        Self::Echo,
        Self::HalfClose,
        Self::SlowReader,
        Self::Drain,
        Self::OutOfFds,
        Self::Proxied,
        #[cfg(feature = "tls")]
        Self::Tls,
    ];

    pub fn is_tls(self) -> bool {
        #[cfg(feature = "tls")]
        return self == Self::Tls;
        #[cfg(not(feature = "tls"))]
        return false;
    }

    /// Each call that it makes, with each error that the call may give.
    pub fn singles(self) -> Result<Vec<Scripted>, String> {
        Ok(failures(&self.play(&[])?))
    }

    /// Plays it with each two failures, but only every `stride`th of all; says how many times. The second is one of all
    /// calls that are made when the first has failed.
    pub fn play_pairs(self, stride: usize) -> Result<usize, String> {
        let (mut seen, mut found, mut played) = (HashSet::new(), 0, 0);
        for first in self.singles()? {
            for second in failures(&self.play(&[first])?) {
                if (second.call, second.after) == (first.call, first.after) {
                    continue;
                }
                let pair = [
                    number(first).min(number(second)),
                    number(first).max(number(second)),
                ];
                if !seen.insert(pair) {
                    continue;
                }
                found += 1;
                if found % stride == 0 {
                    self.play(&[first, second])?;
                    played += 1;
                }
            }
        }
        Ok(played)
    }

    /// Plays it with each failure, and with each two: how many times each.
    pub fn play_all(self) -> Result<(usize, usize), String> {
        let singles = self.singles()?;
        for &failure in &singles {
            self.play(&[failure])?;
        }
        Ok((singles.len(), self.play_pairs(1)?))
    }

    /// Plays it once, with these failures, and judges everything.
    pub fn play(self, failures: &[Scripted]) -> Result<Calls, String> {
        let harmful = failures
            .iter()
            .filter(|failure| is_harmful(self, failure))
            .count();
        self.play_against(failures, harmful)
    }

    /// As [`Scenario::play`], for failures that no client may notice.
    pub fn play_as_harmless(self, failures: &[Scripted]) -> Result<Calls, String> {
        self.play_against(failures, 0)
    }

    fn play_against(self, failures: &[Scripted], harmful: usize) -> Result<Calls, String> {
        let mut stage = Stage::new(self).map_err(|violation| violation.to_string())?;
        let outcome = stage.play(self, failures, harmful);
        outcome.map_err(|violation| format!("{self:?} with {failures:?}: {violation}"))
    }
}

/// All that can fail among so many calls.
fn failures(calls: &Calls) -> Vec<Scripted> {
    let mut all = Vec::new();
    for (&call, &count) in Call::ALL.iter().zip(calls) {
        for after in 0..count as usize {
            let errors = call.errors().iter();
            all.extend(errors.map(|&errno| Scripted { call, after, errno }));
        }
    }
    all
}

fn number(failure: Scripted) -> (Call, usize, i32) {
    (failure.call, failure.after, failure.errno)
}

/// Failures of which a client may notice something: that one alone.
fn is_harmful(scenario: Scenario, failure: &Scripted) -> bool {
    let drains = scenario == Scenario::Drain;
    match failure.call {
        // A client that cannot be accepted when the ports close is lost.
        Call::Accept => failure.errno == libc::ECONNABORTED || drains,
        // What comes after a drain has found nothing more to read is owed no answer.
        Call::Read if failure.errno == libc::EAGAIN => drains,
        Call::Register | Call::Shutdown => true,
        Call::Read | Call::Write => {
            ![libc::EINTR, libc::EAGAIN, libc::ENOMEM, libc::ENOBUFS].contains(&failure.errno)
        }
        _ => false,
    }
}

/// What the handlers leave behind.
#[derive(Debug, Default)]
struct Books {
    opened: u64,
    closed: u64,
    failed_accepts: u64,
    lost: u64,
}

struct Echo;

impl Handler<Books> for Echo {
    fn on_open(&mut self, cx: &mut Context<'_, Books>) -> Outcome {
        cx.app.opened += 1;
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Books>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        if frame == b"bye\n" {
            return Err(Close::new());
        }
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Books>, _: &Closed) {
        cx.app.closed += 1;
    }
}

struct Door;

impl Service<Books> for Door {
    fn accept(&mut self, _: &mut Books, _: Peer) -> Result<Box<dyn Handler<Books>>, Refuse> {
        Ok(Box::new(Echo))
    }

    fn on_failed_accept(&mut self, app: &mut Books, _: &Peer, _: &Closed) {
        app.failed_accepts += 1;
    }

    fn on_listener_lost(&mut self, app: &mut Books, _: ListenerId, _: &std::io::Error) {
        app.lost += 1;
    }
}

/// One client: what it has said and will have heard of an honest echo, and what it has heard.
struct Client {
    id: ClientId,
    said: Vec<u8>,
    heard: Vec<u8>,
    #[cfg(feature = "tls")]
    tls: Option<sim_tls::Client>,
}

/// A server with two listeners and one earlier client.
struct Stage {
    sim: Sim<Books>,
    doors: [SocketAddr; 2],
    clients: Vec<Client>,
    /// No client could connect any more.
    lost: usize,
    is_tls: bool,
    is_proxied: bool,
}

const HEADER: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n";

/// More than two failures may cost: each keeps the listeners out of the poll for half a second.
const PATIENCE: Duration = Duration::from_secs(2);

type Played<T = ()> = Result<T, Violation>;

impl Stage {
    fn new(scenario: Scenario) -> Played<Self> {
        let (is_tls, is_proxied) = (scenario.is_tls(), scenario == Scenario::Proxied);
        let listen = || {
            let listen = Listen::tcp("127.0.0.1:0", Framing::Line).with(|listen| {
                listen.conn.low_watermark = 50;
                listen.conn.high_watermark = 100;
            });
            #[cfg(feature = "tls")]
            if is_tls {
                return listen.tls(sim_tls::server_config());
            }
            if !is_proxied {
                return listen;
            }
            listen.with(|listen| {
                listen.proxy_protocol = ProxyProtocol::Required;
                listen.trusted_proxies = Some(AccessRules::allow_all());
                listen.accept_rate = Some(Rate::per_second(10).burst(2));
                listen.source_limits.connections = Some(100);
                listen.conn.read_rate = Some(Rate::per_second(100).burst(20));
                listen.conn.frame_rate = Some(Rate::per_second(10).burst(1));
                listen.total_frame_rate = Some(Rate::per_second(20).burst(5));
            })
        };
        let mut sim = Sim::new(7, Config::new(), Books::default());
        let doors = [(); 2].map(|()| sim.listen_with(listen(), Door).expect("listen"));
        let mut stage = Self {
            sim,
            doors,
            clients: Vec::new(),
            lost: 0,
            is_tls,
            is_proxied,
        };
        stage.connect(0);
        stage.say(0, "before\n")?;
        Ok(stage)
    }

    /// A client comes, and its header if it has one.
    fn connect(&mut self, door: usize) -> usize {
        let client = self.come(door);
        if self.is_proxied {
            self.sim.send(self.clients[client].id, HEADER);
        }
        client
    }

    /// A client connects; its number, if a listener is left.
    fn come(&mut self, door: usize) -> usize {
        let id = self.sim.connect(self.doors[door]);
        self.lost += usize::from(id.is_none());
        self.clients.extend(id.map(|id| Client {
            id,
            said: Vec::new(),
            heard: Vec::new(),
            #[cfg(feature = "tls")]
            tls: self.is_tls.then(sim_tls::Client::new),
        }));
        self.clients.len() - 1
    }

    fn send(&mut self, client: usize, words: &str) {
        let client = &mut self.clients[client];
        client.said.extend(words.as_bytes());
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut client.tls {
            let wire = tls.encrypt(words.as_bytes());
            return self.sim.send(client.id, &wire);
        }
        self.sim.send(client.id, words.as_bytes());
    }

    /// Sends, and waits until nothing happens any more.
    fn say(&mut self, client: usize, words: &str) -> Played {
        self.send(client, words);
        self.pass(Duration::ZERO)
    }

    fn finish(&mut self, client: usize) {
        let client = &mut self.clients[client];
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut client.tls {
            let wire = tls.close_notify();
            self.sim.send(client.id, &wire);
        }
        self.sim.finish(client.id);
    }

    /// Time passes, and clients hear. A handshake goes forth and back.
    fn pass(&mut self, span: Duration) -> Played {
        self.sim.try_advance(span)?;
        for _ in 0..if self.is_tls { 3 } else { 1 } {
            for client in &mut self.clients {
                let bytes = self.sim.received(client.id);
                #[cfg(feature = "tls")]
                if let Some(tls) = &mut client.tls {
                    // What comes out of a cut stream is judged below.
                    let reply = tls.decrypt(&bytes, &mut client.heard).unwrap_or_default();
                    self.sim.send(client.id, &reply);
                    continue;
                }
                client.heard.extend(bytes);
            }
            if self.is_tls {
                self.sim.try_advance(Duration::ZERO)?;
            }
        }
        Ok(())
    }

    fn play(
        &mut self,
        scenario: Scenario,
        failures: &[Scripted],
        harmful: usize,
    ) -> Result<Calls, String> {
        let count =
            |sim: &Sim<Books>| -> Calls { Call::ALL.iter().map(|&call| sim.calls(call)).collect() };
        let before = count(&self.sim);
        let mut faults = Faults::none();
        faults.script.extend(failures);
        self.sim.set_faults(faults);
        self.act(scenario)
            .map_err(|violation| violation.to_string())?;
        let calls = count(&self.sim)
            .iter()
            .zip(before)
            .map(|(after, before)| after - before)
            .collect();
        self.sim.set_faults(Faults::none());
        self.sim.set_descriptor_limit(usize::MAX);
        self.judge(scenario, failures, harmful)?;
        Ok(calls)
    }

    fn act(&mut self, scenario: Scenario) -> Played {
        match scenario {
            Scenario::Echo => self.chat(),
            #[cfg(feature = "tls")]
            Scenario::Tls => self.chat(),
            Scenario::HalfClose => {
                let client = self.connect_clogged(0);
                self.send(client, &"a line of words\n".repeat(20));
                self.finish(client);
                self.pass(Duration::from_millis(100))?;
                self.read_slowly(client)
            }
            Scenario::SlowReader => {
                let client = self.connect_clogged(0);
                self.send(client, &"a line of words\n".repeat(20));
                self.read_slowly(client)?;
                self.finish(client);
                self.pass(Duration::ZERO)
            }
            Scenario::Drain => self.drain(),
            Scenario::OutOfFds => self.out_of_fds(),
            Scenario::Proxied => self.chat_behind_a_proxy(),
        }
    }

    fn chat(&mut self) -> Played {
        let client = self.connect(0);
        self.say(client, "one\n")?;
        self.pass(PATIENCE)?;
        self.say(client, "two\n")?;
        self.pass(PATIENCE)?;
        self.finish(client);
        self.pass(Duration::ZERO)
    }

    fn chat_behind_a_proxy(&mut self) -> Played {
        let client = self.come(0);
        let (head, tail) = HEADER.split_at(9);
        self.sim.send(self.clients[client].id, head);
        self.pass(Duration::from_millis(10))?;
        self.sim.send(self.clients[client].id, tail);
        self.say(client, "one\ntwo\nthree words more\n")?;
        self.pass(PATIENCE)?;
        self.finish(client);
        self.pass(Duration::ZERO)
    }

    /// A client that does not read by itself, and has a small buffer.
    fn connect_clogged(&mut self, door: usize) -> usize {
        let client = self.connect(door);
        let id = self.clients[client].id;
        self.sim.set_reading(id, false);
        self.sim.set_send_buffer(id, 60);
        client
    }

    /// A little, a little more, and then all.
    fn read_slowly(&mut self, client: usize) -> Played {
        let id = self.clients[client].id;
        for _ in 0..4 {
            self.pass(Duration::from_millis(100))?;
            self.sim.read(id, 40);
        }
        self.sim.set_reading(id, true);
        self.pass(Duration::from_millis(100))
    }

    fn drain(&mut self) -> Played {
        let closing = self.connect(0);
        self.say(closing, "bye\n")?;
        let clogged = self.connect_clogged(1);
        self.say(clogged, &"a line of words\n".repeat(10))?;
        self.pass(PATIENCE)?;
        let waiting = self.connect(1);
        self.send(waiting, "just in time\n");
        self.sim.control().drain(Duration::from_secs(5));
        self.pass(Duration::from_millis(100))?;
        self.read_slowly(clogged)?;
        // All but the lingering client finish when the server does.
        for client in [0, clogged, waiting] {
            self.finish(client);
        }
        self.pass(Duration::from_secs(6))
    }

    fn out_of_fds(&mut self) -> Played {
        self.sim.set_descriptor_limit(self.sim.descriptors() + 1);
        let clients: Vec<usize> = (0..4).map(|number| self.connect(number % 2)).collect();
        for &client in &clients {
            self.send(client, "hungry\n");
        }
        self.pass(Duration::from_millis(600))?;
        for &client in &clients {
            self.pass(Duration::from_millis(100))?;
            self.finish(client);
        }
        self.pass(Duration::from_secs(1))
    }

    /// Every client but those that were hit has all its output; new clients are served; the server
    /// ends, and the counters add up.
    fn judge(
        &mut self,
        scenario: Scenario,
        failures: &[Scripted],
        harmful: usize,
    ) -> Result<(), String> {
        let said = |violation: Violation| violation.to_string();
        self.pass(Duration::from_secs(5)).map_err(said)?;
        // The same listener may fail twice: then it is lost, with all clients in its backlog.
        let broken = failures
            .iter()
            .filter(|failure| failure.errno == libc::EINVAL)
            .count();
        let lost = self.sim.app().lost;
        if lost > 0 && broken < 2 {
            return Err("a listener is lost".to_owned());
        }
        let drained = scenario == Scenario::Drain;
        if !drained && lost == 0 {
            self.say(0, "again\n").map_err(said)?;
            let newcomer = self.connect(0);
            self.say(newcomer, "after\n").map_err(said)?;
            if self.clients[newcomer].heard != b"after\n" {
                return Err("a newcomer is not served".to_owned());
            }
            if self.clients[0].heard != b"before\nagain\n" {
                return Err("the bystander was disturbed".to_owned());
            }
        }
        let mut harmed = 0;
        for (number, client) in self.clients.iter().enumerate() {
            if !client.said.starts_with(&client.heard) {
                let heard = String::from_utf8_lossy(&client.heard);
                return Err(format!("client {number} heard {heard:?}"));
            }
            harmed += usize::from(client.heard != client.said);
        }
        if lost == 0 && harmed > harmful {
            return Err(format!(
                "{harmed} clients were harmed by {harmful} failures"
            ));
        }
        if !drained {
            self.sim.control().drain(Duration::from_secs(1));
        }
        self.pass(Duration::from_secs(20)).map_err(said)?;
        self.check_books()
    }

    fn check_books(&self) -> Result<(), String> {
        let (books, stats) = (self.sim.app(), self.sim.stats());
        if self.sim.drain_report().is_none() {
            return Err("the drain does not end".to_owned());
        }
        if let Some(alive) = self
            .clients
            .iter()
            .position(|client| self.sim.state(client.id) == ClientState::Connected)
        {
            return Err(format!("client {alive} was not told the end"));
        }
        let balance = (
            stats.open,
            self.sim.descriptors(),
            stats.accepted,
            stats.opened,
            books.opened,
        );
        let expected = (0, 0, stats.closed_total(), books.closed, books.closed);
        if balance != expected || stats.accepted != books.opened + books.failed_accepts {
            return Err(format!("the books: {balance:?}, {expected:?}, {books:?}"));
        }
        Ok(())
    }
}

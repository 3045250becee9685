//! A server whose handlers are closures, and a bystander that is served from the beginning to the
//! end.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{
    CloseReason, Closed, Config, ConnId, Context, Framing, Handle, Handler, Listen, Outcome, Peer,
    Refuse, Service, Stats,
};

use kit::planned::{blow, PanicOnDrop};
pub use kit::script::Call;
use kit::script::{usual, Play, ScriptedHandler};

/// What the handlers of one server leave behind.
pub struct Log {
    pub accepted: usize,
    /// What all but the bystander were told.
    pub told: Vec<&'static str>,
    /// Close reasons, by number in the order of accept.
    pub reasons: Vec<(usize, CloseReason)>,
    pub failed_accepts: Vec<CloseReason>,
    pub ids: Vec<ConnId>,
    pub handle: Option<Handle<Log>>,
    /// From now on every handler behaves.
    pub over: bool,
    /// For the test's own use.
    pub count: usize,
    pub results: Vec<String>,
}

impl Log {
    pub fn handle(&self) -> Handle<Self> {
        self.handle.clone().expect("set before anybody comes")
    }

    pub fn times(&self, told: &str) -> usize {
        self.told.iter().filter(|what| **what == told).count()
    }
}

pub type Cx<'a> = Context<'a, Log>;
pub type Script = Rc<dyn Fn(&mut Cx<'_>, Call<'_>) -> Outcome>;

/// The test's input. The bystander behaves, and so does every handler in the end.
pub struct Part {
    pub number: usize,
    pub play: Script,
    pub _panic_on_drop: Option<PanicOnDrop>,
}

impl Play<Log> for Part {
    fn play(&mut self, cx: &mut Cx<'_>, call: Call<'_>) -> Outcome {
        match &call {
            Call::Open => cx.app.ids.push(cx.conn.id()),
            Call::Close(closed) => cx.app.reasons.push((self.number, closed.reason)),
            _ => {}
        }
        if self.number == 0 || cx.app.over {
            return behave(cx, call);
        }
        cx.app.told.push(call.name());
        (self.play)(cx, call)
    }
}

/// A good echo.
pub fn behave(cx: &mut Cx<'_>, call: Call<'_>) -> Outcome {
    usual(cx, call)
}

/// What the service does to all but the bystander.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Welcome {
    Accept,
    /// Refuses, and panics when it hears that the refused one has gone.
    RefuseAndPanic,
    Panic,
    /// Its handler panics when it is dropped.
    PanicOnDrop,
}

struct Usher {
    play: Script,
    welcome: Welcome,
}

impl Service<Log> for Usher {
    fn accept(&mut self, app: &mut Log, _: Peer) -> Result<Box<dyn Handler<Log>>, Refuse> {
        let number = app.accepted;
        app.accepted += 1;
        let welcome = if number == 0 || app.over {
            Welcome::Accept
        } else {
            self.welcome
        };
        match welcome {
            Welcome::Panic => blow(),
            Welcome::RefuseAndPanic => Err(Refuse::with_farewell("not you\n")),
            Welcome::Accept | Welcome::PanicOnDrop => Ok(Box::new(ScriptedHandler::new(Part {
                number,
                play: Rc::clone(&self.play),
                _panic_on_drop: (welcome == Welcome::PanicOnDrop).then(|| PanicOnDrop),
            }))),
        }
    }

    fn on_failed_accept(&mut self, app: &mut Log, _: &Peer, closed: &Closed) {
        app.failed_accepts.push(closed.reason);
        if self.welcome == Welcome::RefuseAndPanic {
            blow();
        }
    }
}

/// A server, and a bystander that is served from the beginning to the end.
pub struct Harness {
    pub sim: Sim<Log>,
    pub addr: SocketAddr,
    pub bystander: ClientId,
}

pub fn lines() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Line)
}

pub fn harness(play: impl Fn(&mut Cx<'_>, Call<'_>) -> Outcome + 'static) -> Harness {
    harness_of(Config::new(), lines(), Welcome::Accept, play)
}

pub fn harness_of(
    config: Config,
    listen: Listen,
    welcome: Welcome,
    play: impl Fn(&mut Cx<'_>, Call<'_>) -> Outcome + 'static,
) -> Harness {
    let log = Log {
        accepted: 0,
        told: Vec::new(),
        reasons: Vec::new(),
        failed_accepts: Vec::new(),
        ids: Vec::new(),
        handle: None,
        over: false,
        count: 0,
        results: Vec::new(),
    };
    let mut sim = Sim::new(11, config, log);
    sim.app_mut().handle = Some(sim.handle());
    let usher = Usher {
        play: Rc::new(play),
        welcome,
    };
    let addr = sim.listen_with(listen, usher).expect("listen");
    let bystander = sim.connect(addr).expect("connected");
    let mut harness = Harness {
        sim,
        addr,
        bystander,
    };
    harness.serve(bystander, "hello\n");
    harness
}

impl Harness {
    pub fn enter(&mut self) -> ClientId {
        let client = self.sim.connect(self.addr).expect("connected");
        self.sim.settle();
        client
    }

    pub fn say(&mut self, client: ClientId, words: &str) {
        self.sim.send(client, words.as_bytes());
        self.sim.settle();
    }

    pub fn heard(&mut self, client: ClientId) -> String {
        String::from_utf8(self.sim.received(client)).expect("text")
    }

    #[track_caller]
    pub fn serve(&mut self, client: ClientId, words: &str) {
        self.say(client, words);
        assert_eq!(self.heard(client), words, "is served");
    }

    /// The client finishes too, so that nothing lingers; how the connection stands then.
    pub fn leave(&mut self, client: ClientId) -> ClientState {
        self.sim.finish(client);
        self.sim.settle();
        self.sim.state(client)
    }

    /// The first client after the bystander has ended for this reason, and no other has ended.
    #[track_caller]
    pub fn ended(&self, reason: CloseReason) {
        assert_eq!(self.sim.app().reasons, [(1, reason)]);
        assert_eq!(
            kit::reasons(|reason| self.sim.stats().closed(reason)),
            [(reason, 1)]
        );
    }

    /// The bystander is served as before, and so is a new client; the server ends clean.
    #[track_caller]
    pub fn end(mut self, panics: u64) -> Stats {
        self.sim.app_mut().over = true;
        self.serve(self.bystander, "still here\n");
        let newcomer = self.enter();
        self.serve(newcomer, "and new\n");
        self.sim.control().drain(Duration::from_secs(10));
        self.sim.settle();
        for client in [self.bystander, newcomer] {
            assert_eq!(self.leave(client), ClientState::Finished);
        }
        self.sim.advance(Duration::from_secs(20));
        let (stats, log) = (self.sim.stats(), self.sim.app());
        assert!(self.sim.drain_report().is_some(), "the drain is over");
        assert_eq!((stats.open, self.sim.descriptors()), (0, 0));
        assert_eq!(stats.accepted, stats.closed_total());
        assert_eq!(
            stats.opened as usize,
            log.reasons.len(),
            "one on_close for each on_open"
        );
        assert_eq!(
            stats.opened as usize + log.failed_accepts.len(),
            stats.accepted as usize
        );
        assert_eq!(stats.panics, panics);
        stats
    }
}

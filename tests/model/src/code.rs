//! The same events, played by the real server in the simulator, and compared with the model after
//! each.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use portcullis::sim::{ClientId, Sim};
use portcullis::{
    AccessRules, AtCapacity, Close, CloseReason, Config, Context, Framing, Handler, Listen,
    ListenerId, ListenerState, Outcome, Peer, ProxyProtocol, Refuse, State as ConnState,
};

use crate::connection::{Reaction, Reason};
use crate::events::{Event, Quiet, Stage, Timer};
#[cfg(not(feature = "tls"))]
use crate::insecure::Secure;
use crate::listener::State;
#[cfg(feature = "tls")]
use crate::secure::Secure;
use crate::world::MAX_CLIENTS;
use crate::Setting;

/// The short deadline.
const SHORT: Duration = Duration::from_secs(10);
/// A deadline that does not pass.
const LONG: Duration = Duration::from_secs(20 * 60 * 60);
/// The longest line.
const MAX_FRAME: usize = 64;
const HEADER: &[u8] = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n";
const DENIED: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1));

/// What the handlers are to do next.
struct App {
    on_finish: Reaction,
    on_drain: Reaction,
    refuses: bool,
}

struct Scripted;

fn react(cx: &mut Context<'_, App>, reaction: Reaction) -> Outcome {
    match reaction {
        Reaction::Close => Err(Close::new()),
        Reaction::Abort => Err(Close::abort()),
        // Without the report of the panic hook.
        Reaction::Panic => std::panic::resume_unwind(Box::new("as the script says")),
        Reaction::Send => Ok(cx.conn.send(vec![b'x'; 1000])?),
        _ => Ok(()),
    }
}

/// The byte at the end of a frame, for what its handler does.
const WORDS: [(u8, Reaction); 5] = [
    (b'p', Reaction::Proceed),
    (b's', Reaction::Send),
    (b'c', Reaction::Close),
    (b'a', Reaction::Abort),
    (b'!', Reaction::Panic),
];

impl Handler<App> for Scripted {
    fn on_frame(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
        let word = WORDS
            .iter()
            .find(|(byte, _)| frame.trim_ascii_end().last() == Some(byte));
        react(
            cx,
            word.map_or(Reaction::Proceed, |(_, reaction)| *reaction),
        )
    }

    fn on_finish(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        react(cx, cx.app.on_finish)
    }

    fn on_drain(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        react(cx, cx.app.on_drain)
    }
}

/// A server with the options of a setting.
struct Server {
    sim: Sim<App>,
    addr: SocketAddr,
    listener: ListenerId,
    clients: [Option<Sender>; MAX_CLIENTS],
    secure: [Option<Secure>; MAX_CLIENTS],
    setting: Setting,
    timer: Timer,
    /// Descriptors for connections that the process may open.
    fds: u8,
}

#[derive(Clone, Copy)]
struct Sender {
    id: ClientId,
    peer: SocketAddr,
    /// Bytes of the PROXY header that it has sent.
    header: usize,
}

impl Server {
    fn new(setting: Setting, timer: Timer) -> portcullis::Result<Server> {
        let time = |of: Timer| if of == timer { SHORT } else { LONG };
        let app = App {
            on_finish: Reaction::Proceed,
            on_drain: Reaction::Proceed,
            refuses: false,
        };
        let config = Config::max_connections(setting.cap).with(|config| {
            config.emfile_backoff = time(Timer::Retry);
            config.pending_limits.connections = setting.cap.into();
            config.pending_limits.grace = time(Timer::FirstFrame);
        });
        let mut listen = Listen::tcp("127.0.0.1:0", Framing::Line).with(|listen| {
            listen.evict_silent = setting.evicts;
            listen.conn.max_frame = Some(MAX_FRAME);
            listen.conn.handshake_timeout = time(Timer::Handshake);
            listen.conn.frame_timeout = time(Timer::Frame);
            listen.conn.idle_timeout = time(Timer::Idle);
            listen.conn.write_timeout = time(Timer::Write);
            listen.conn.linger_timeout = time(Timer::Linger);
            listen.conn.min_rate = u32::MAX;
        });
        listen.access_rules = AccessRules::allow_all().deny("203.0.113.0/24")?;
        if setting.proxy {
            listen.proxy_protocol = ProxyProtocol::Required;
            listen.trusted_proxies = Some(AccessRules::allow_all());
        }
        if setting.tls {
            listen = Secure::listen(listen);
        }
        if setting.refuses {
            listen.at_capacity = AtCapacity::Refuse {
                farewell: Vec::new(),
            };
        }
        let mut sim = Sim::try_new(0, config, app)?;
        let service = portcullis::try_accept(|app: &mut App, _: Peer| {
            if app.refuses {
                Err(Refuse::silently())
            } else {
                Ok(Scripted)
            }
        });
        let addr = sim.listen_with(listen, service)?;
        let listener = sim
            .control()
            .listeners()
            .first()
            .map(|listener| listener.id);
        let listener = listener.expect("it was opened just now");
        let mut server = Server {
            sim,
            addr,
            listener,
            clients: [None; MAX_CLIENTS],
            secure: std::array::from_fn(|_| setting.tls.then(Secure::new)),
            setting,
            timer,
            fds: setting.fds,
        };
        server.limit_fds();
        server.sim.settle();
        Ok(server)
    }

    /// The listener has one, too.
    fn limit_fds(&mut self) {
        self.sim.set_descriptor_limit(1 + usize::from(self.fds));
    }

    fn play(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Connect { denied } => self.connect(denied)?,
            Event::SendPart(client) => self.send(client, None)?,
            Event::SendWhole(client, reaction) => self.send(client, Some(reaction))?,
            Event::HalfClose(client, reaction) => {
                self.sim.app_mut().on_finish = reaction;
                let (id, stage) = (self.client(client)?.id, self.stage(client));
                if let (Stage::Open | Stage::Closing, Some(secure)) =
                    (stage, &mut self.secure[client])
                {
                    self.sim.send(id, &secure.close_notify());
                }
                self.sim.finish(id);
            }
            Event::Reset(client) => {
                let id = self.client(client)?.id;
                self.sim.reset(id);
            }
            Event::TakeOutput(client) => {
                let id = self.client(client)?.id;
                self.sim.set_reading(id, true);
                self.sim.settle();
                self.sim.set_reading(id, false);
            }
            Event::Local(client, reaction) => self.act(client, reaction)?,
            Event::TakeFd | Event::FreeFd => {
                self.fds = self.setting.fds - u8::from(event == Event::TakeFd);
                self.limit_fds();
            }
            Event::TimePasses => {
                // Whether the peer takes output is asked for once in each time.
                let times = if self.timer == Timer::Write { 2 } else { 1 };
                self.sim.advance(SHORT * times + Duration::from_millis(1));
            }
            Event::Suspend => self.sim.control().suspend(self.listener).map_err(text)?,
            Event::Resume => self.sim.control().resume(self.listener).map_err(text)?,
            Event::CloseListener => self
                .sim
                .control()
                .close_listener(self.listener)
                .map_err(text)?,
            Event::Drain(reaction) => {
                self.sim.app_mut().on_drain = reaction;
                let grace = if self.timer == Timer::Drain {
                    SHORT
                } else {
                    LONG
                };
                self.sim.control().drain(grace);
            }
        }
        self.sim.settle();
        Ok(())
    }

    fn client(&self, number: usize) -> Result<Sender, String> {
        self.clients[number].ok_or_else(|| format!("client {number} has not connected"))
    }

    fn connect(&mut self, denied: bool) -> Result<(), String> {
        let free = self
            .clients
            .iter_mut()
            .find(|client| client.is_none())
            .ok_or("too many clients")?;
        let id = match denied {
            true => self.sim.connect_from(self.addr, DENIED),
            false => self.sim.connect(self.addr),
        };
        let id = id.ok_or("the port is closed")?;
        let peer = self
            .sim
            .client_addr(id)
            .ok_or("a client without an address")?;
        // TLS has something to say at any time.
        if !self.setting.tls {
            self.sim.set_reading(id, false);
            self.sim.set_send_buffer(id, 16);
        }
        *free = Some(Sender {
            id,
            peer,
            header: 0,
        });
        Ok(())
    }

    /// Sends bytes that are a part of what is to come (`None`), or that complete it.
    fn send(&mut self, number: usize, worth: Option<Reaction>) -> Result<(), String> {
        let client = self.client(number)?;
        let stage = self.stage(number);
        let bytes = match stage {
            Stage::Accepting => self.header(number, worth)?,
            Stage::Handshaking => match (worth, &mut self.secure[number]) {
                (None, Some(secure)) => secure.part(),
                (Some(Reaction::Malformed), _) => vec![b'#'; 20_000],
                (Some(_), Some(secure)) => return secure.shake(&mut self.sim, client.id),
                (_, None) => return Err("a handshake without TLS".to_owned()),
            },
            _ => self.frame(number, worth),
        };
        self.sim.app_mut().refuses = worth == Some(Reaction::Refuse);
        self.sim.send(client.id, &bytes);
        self.sim.settle();
        self.sim.app_mut().refuses = false;
        Ok(())
    }

    /// Bytes of a PROXY header.
    fn header(&mut self, number: usize, worth: Option<Reaction>) -> Result<Vec<u8>, String> {
        let client = self.clients[number]
            .as_mut()
            .ok_or("a client that has not connected")?;
        let rest = HEADER.get(client.header..).unwrap_or_default();
        Ok(match worth {
            None => {
                client.header += 1;
                rest.iter().take(1).copied().collect()
            }
            Some(Reaction::Malformed) => vec![b'#'; HEADER.len()],
            Some(_) => rest.to_vec(),
        })
    }

    /// Bytes of a line.
    fn frame(&mut self, number: usize, worth: Option<Reaction>) -> Vec<u8> {
        let plain = match worth {
            None => vec![b'.'],
            Some(Reaction::Malformed) => vec![b'.'; MAX_FRAME + 1],
            Some(reaction) => {
                let word = WORDS.iter().find(|(_, word)| *word == reaction);
                vec![word.map_or(b'p', |(byte, _)| *byte), b'\n']
            }
        };
        match &mut self.secure[number] {
            Some(secure) => secure.encrypt(&plain),
            None => plain,
        }
    }

    fn act(&mut self, number: usize, reaction: Reaction) -> Result<(), String> {
        let peer = self.client(number)?.peer;
        let mut control = self.sim.control();
        let found = control
            .connections()
            .into_iter()
            .find(|conn| conn.peer == peer);
        let id = found
            .ok_or_else(|| format!("client {number} has no connection"))?
            .id;
        let mut conn = control.conn(id).ok_or("a connection that is listed")?;
        match reaction {
            Reaction::Close => conn.close(),
            Reaction::Abort => conn.abort(),
            _ => conn.send(vec![b'x'; 1000]).map_err(text)?,
        }
        Ok(())
    }

    fn listener(&mut self) -> State {
        // One that is closed and has no connections is gone.
        match self
            .sim
            .control()
            .listener(self.listener)
            .map(|listener| listener.state)
        {
            Ok(ListenerState::Listening) => State::Listening,
            Ok(ListenerState::Full) => State::Full,
            Ok(ListenerState::OutOfFds) => State::OutOfFds,
            Ok(ListenerState::Suspended) => State::Suspended,
            Ok(ListenerState::Closed) | Err(_) => State::Closed,
            Ok(other) => panic!("{other}: there is no rate in any setting"),
        }
    }

    /// What the server shows of a client. `Gone` if it shows nothing and has counted no end.
    fn stage(&mut self, number: usize) -> Stage {
        let Some(client) = self.clients[number] else {
            return Stage::Absent;
        };
        let control = self.sim.control();
        if let Some(conn) = control
            .connections()
            .iter()
            .find(|conn| conn.peer == client.peer)
        {
            return match conn.state {
                ConnState::Accepting => Stage::Accepting,
                ConnState::Handshaking => Stage::Handshaking,
                ConnState::Open => Stage::Open,
                ConnState::Closing => Stage::Closing,
                other => panic!("{other}: no setting connects"),
            };
        }
        let closes = control.recent_closes();
        let mut ends = closes.iter().filter(|close| close.peer == client.peer);
        let reason = ends.next().map(|close| {
            let known = reason(close.reason);
            known.unwrap_or_else(|| panic!("no event leads to {}", close.reason))
        });
        assert!(ends.next().is_none(), "client {number} has ended twice");
        if reason.is_none() && self.listener() != State::Closed {
            Stage::Waiting
        } else {
            Stage::Gone(reason)
        }
    }

    /// Compares the server with the model.
    fn compare(&mut self, model: &Quiet) -> Result<(), String> {
        let (listener, expected) = (self.listener(), model.world.listener.state);
        if listener != expected {
            return Err(format!(
                "the listener is {listener:?}, in the model {expected:?}"
            ));
        }
        for (number, client) in model.world.clients.iter().enumerate() {
            let (stage, expected) = (self.stage(number), Stage::of(client));
            if stage != expected {
                return Err(format!(
                    "client {number} is {stage:?}, in the model {expected:?}"
                ));
            }
        }
        Ok(())
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The model's name for a reason. `None` if it has none.
pub fn reason(reason: CloseReason) -> Option<Reason> {
    Some(match reason {
        CloseReason::Finished => Reason::Finished,
        CloseReason::Truncated => Reason::Truncated,
        CloseReason::ClosedEarly => Reason::ClosedEarly,
        CloseReason::Reset => Reason::Reset,
        CloseReason::BadProxyHeader | CloseReason::FrameTooLarge => Reason::Malformed,
        CloseReason::TlsHandshake | CloseReason::NotTls => Reason::HandshakeFailed,
        CloseReason::Denied => Reason::Denied,
        CloseReason::Refused => Reason::Refused,
        CloseReason::AtCapacity => Reason::AtCapacity,
        CloseReason::Closed => Reason::Closed,
        CloseReason::Aborted => Reason::Aborted,
        CloseReason::Panicked => Reason::Panicked,
        CloseReason::HandshakeTimeout => Reason::HandshakeTimeout,
        CloseReason::FrameTimeout => Reason::FrameTimeout,
        CloseReason::IdleTimeout => Reason::IdleTimeout,
        CloseReason::WriteTimeout => Reason::WriteTimeout,
        CloseReason::Evicted => Reason::Evicted,
        CloseReason::Drained => Reason::Drained,
        CloseReason::DrainForced => Reason::DrainTimeout,
        _ => return None,
    })
}

/// Plays events, and compares after each.
///
/// # Errors
///
/// The first difference, as text.
pub fn play(setting: &Setting, timer: Timer, way: &[Event]) -> Result<(), String> {
    let mut server = Server::new(*setting, timer).map_err(text)?;
    let mut model = Quiet::new(setting).ok_or("a model without a beginning")?;
    for (played, event) in way.iter().enumerate() {
        let after = |what: String| {
            format!(
                "{}: {timer:?}: after {:?}: {what}",
                setting.name,
                &way[..=played]
            )
        };
        model = model
            .after(setting, timer, *event)
            .ok_or_else(|| after("it cannot happen".to_owned()))?;
        server.play(*event).map_err(after)?;
        server.compare(&model).map_err(after)?;
    }
    Ok(())
}

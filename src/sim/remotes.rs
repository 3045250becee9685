//! The servers to which the simulated one connects, and the peers of adopted sockets.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use super::addrs::{local_addr, tcp_part};
use super::answer::Answer;
use super::clients::ClientId;
use super::faults::Call;
use super::kernel::Kernel;
use super::socket::{Dial, SimSocket};
use super::Sim;
use crate::addr::Addr;
use crate::proto::Time;
use crate::reactor::os::Connected;

impl<A> Sim<A> {
    /// Sets the result of the server's attempts to connect to this address from now on. The
    /// server's own listeners need none: attempts reach them.
    ///
    /// The other end of such a connection is used like a client, by its [`ClientId`] from
    /// [`Sim::dialed`]:
    ///
    /// ```
    /// use portcullis::sim::{Answer, Sim};
    /// use portcullis::{Config, Connect, Context, Framing, Handler, Outcome};
    ///
    /// struct Client;
    /// impl Handler for Client {
    ///     fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
    ///         cx.conn.send("hello\n")?;
    ///         Ok(())
    ///     }
    ///     fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome { Ok(()) }
    /// }
    ///
    /// let mut sim = Sim::new(1, Config::new(), ());
    /// sim.remote("203.0.113.7:25", Answer::Accept);
    /// let connect = Connect::new(Framing::Line);
    /// sim.control().connect("203.0.113.7:25", connect, Client).unwrap();
    /// sim.settle();
    /// let dialed = sim.dialed("203.0.113.7:25");
    /// assert_eq!(sim.received(dialed[0]), b"hello\n");
    /// ```
    ///
    /// # Panics
    ///
    /// If `addr` is no address.
    #[track_caller]
    pub fn remote<T>(&mut self, addr: T, answer: Answer)
    where
        T: TryInto<Addr>,
        T::Error: std::fmt::Debug,
    {
        let addr = addr.try_into().expect("an address");
        self.kernel.borrow_mut().answers.insert(addr, answer);
    }

    /// Returns the other ends of the connections to this address, oldest first, including those
    /// that have ended.
    ///
    /// # Panics
    ///
    /// If `addr` is no address.
    #[track_caller]
    pub fn dialed<T>(&self, addr: T) -> Vec<ClientId>
    where
        T: TryInto<Addr>,
        T::Error: std::fmt::Debug,
    {
        let addr = addr.try_into().expect("an address");
        let kernel = self.kernel.borrow();
        let sockets = kernel.sockets.iter().enumerate();
        let dialed = sockets
            .filter(|(_, socket)| socket.dial == Dial::Done && socket.to.as_ref() == Some(&addr));
        dialed.map(|(index, _)| ClientId(index)).collect()
    }

    /// Returns the other ends of the adopted sockets ([`Control::adopt`](crate::Control::adopt)),
    /// oldest first, including those that have ended.
    ///
    /// The descriptor is checked as by a server, its options are set, and the bytes that it has
    /// received are read. Then the simulator closes it, and simulates a connection in its place.
    /// Over TCP the peer has a client's address ([`Sim::client_addr`]).
    ///
    /// ```
    /// use std::os::unix::net::UnixStream;
    /// use portcullis::sim::Sim;
    /// use portcullis::{Config, Connect, Context, Framing, Handler, Outcome};
    ///
    /// struct Echo;
    /// impl Handler for Echo {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, line: &[u8]) -> Outcome {
    ///         cx.conn.send(line)?;
    ///         Ok(())
    ///     }
    /// }
    ///
    /// let mut sim = Sim::new(1, Config::new(), ());
    /// let (ours, _theirs) = UnixStream::pair().unwrap();
    /// sim.control().adopt(ours, Connect::new(Framing::Line), Echo).unwrap();
    /// let client = sim.adopted()[0];
    /// sim.send(client, b"hello\n");
    /// sim.settle();
    /// assert_eq!(sim.received(client), b"hello\n");
    /// ```
    pub fn adopted(&self) -> Vec<ClientId> {
        let kernel = self.kernel.borrow();
        let sockets = kernel.sockets.iter().enumerate();
        let adopted = sockets.filter(|(_, socket)| socket.dial == Dial::Adopted);
        adopted.map(|(index, _)| ClientId(index)).collect()
    }
}

impl Kernel {
    /// Creates a socket that connects. Returns its number, its local address, and whether it is
    /// connected at once.
    pub(super) fn dial(
        &mut self,
        to: &Addr,
        bind: Option<SocketAddr>,
    ) -> io::Result<(usize, SocketAddr, bool)> {
        if self.fds >= self.fd_limit {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        if self.now < self.famine_until {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let index = self.sockets.len();
        let strike = self.strike(Call::Connect, None);
        let at_once = [
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOBUFS,
            libc::ENOMEM,
            libc::EADDRNOTAVAIL,
            libc::ENETUNREACH,
        ];
        let answer = match strike {
            Some(errno) if at_once.contains(&errno) => {
                return Err(io::Error::from_raw_os_error(errno))
            }
            Some(errno) => {
                let after = Duration::from_millis(self.random.below(2_000) as u64);
                Answer::FailAfter(after, errno)
            }
            None => self.answer(to),
        };
        let dial = match answer {
            Answer::Accept if to.as_unix().is_some() => Dial::Done,
            Answer::Refuse if to.as_unix().is_some() => {
                return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED))
            }
            Answer::Accept => Dial::Until(self.now, None),
            Answer::AcceptAfter(after) => Dial::Until(self.now.after(after), None),
            Answer::Refuse => Dial::Until(self.now, Some(libc::ECONNREFUSED)),
            Answer::FailAfter(after, errno) => Dial::Until(self.now.after(after), Some(errno)),
            Answer::Silence => Dial::Until(Time::NEVER, None),
        };
        let own = local_addr(index);
        let local = match bind {
            Some(local) if local.port() > 0 => local,
            Some(local) => SocketAddr::new(local.ip(), own.port()),
            None => own,
        };
        let mut socket = SimSocket::new(tcp_part(to), local);
        socket.held = true;
        socket.dial = dial;
        socket.to = Some(to.clone());
        let connected = dial == Dial::Done;
        self.fds += 1;
        self.sockets.push(socket);
        if !connected {
            self.dialing.push(index);
        }
        if let Some(notes) = &mut self.notes {
            notes.begun.push(index);
        }
        self.trace
            .line([9, index as u64, u64::from(connected), 0], || {
                format!("  connect: {index} to {to}")
            });
        Ok((index, local, connected))
    }

    fn answer(&self, to: &Addr) -> Answer {
        let own = |addr: SocketAddr| {
            self.listeners
                .iter()
                .any(|listener| listener.open && listener.addr == addr)
        };
        match self.answers.get(to) {
            Some(answer) => *answer,
            None if to.as_tcp().is_some_and(own) => Answer::Accept,
            None => Answer::Refuse,
        }
    }

    /// The state of an attempt; once it has succeeded, reads report what follows.
    pub(super) fn connected(&mut self, index: usize) -> io::Result<Connected> {
        let Some(socket) = self.sockets.get_mut(index).filter(|socket| socket.held) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        match (socket.error, socket.dial) {
            (_, Dial::No | Dial::Done | Dial::Adopted) => Ok(Connected::Yes),
            (Some(errno), Dial::Until(..)) => Err(io::Error::from_raw_os_error(errno)),
            (None, Dial::Until(..)) => Ok(Connected::NotYet),
        }
    }

    /// Ends the attempts whose time has come, with success or failure.
    pub(super) fn answer_dials(&mut self) {
        for index in std::mem::take(&mut self.dialing) {
            let now = self.now;
            let Some(socket) = self.sockets.get(index).filter(|socket| socket.held) else {
                continue;
            };
            let Dial::Until(at, errno) = socket.dial else {
                continue;
            };
            if at > now {
                self.dialing.push(index);
                continue;
            }
            let (local, to) = (socket.local, socket.peer);
            let errno = errno.or_else(|| self.meet(index, local, to));
            if let Some(socket) = self.sockets.get_mut(index) {
                match errno {
                    Some(errno) => socket.error = Some(errno),
                    None => socket.dial = Dial::Done,
                }
                (socket.input_edge, socket.room_edge) = (socket.has_input(), true);
            }
        }
    }

    /// Hands the other end to one of the server's own listeners, if it is the target; the errno if
    /// its backlog is full.
    fn meet(&mut self, index: usize, from: SocketAddr, to: SocketAddr) -> Option<i32> {
        let other = self.sockets.len();
        let mut listeners = self.listeners.iter_mut();
        let listener = listeners.find(|listener| listener.open && listener.addr == to)?;
        if listener.queue.len() >= listener.backlog.max(1) {
            return Some(libc::ETIMEDOUT);
        }
        listener.queue.push_back(other);
        listener.edge = true;
        let mut socket = SimSocket::new(from, to);
        (socket.reads, socket.joined) = (false, Some(index));
        self.sockets.push(socket);
        if let Some(socket) = self.sockets.get_mut(index) {
            (socket.reads, socket.joined) = (false, Some(other));
        }
        self.joined.extend([index, other]);
        None
    }

    /// Moves bytes between the two ends of a connection of the server with itself.
    pub(super) fn carry(&mut self) {
        for at in 0..self.joined.len() {
            let Some(&index) = self.joined.get(at) else {
                return;
            };
            let Some(other) = self.sockets.get(index).and_then(|socket| socket.joined) else {
                continue;
            };
            let room = self.sockets.get(other).map_or(0, |socket| {
                let held = socket.received.len() + socket.underway.len();
                socket.receive_buffer.saturating_sub(held)
            });
            let Some(socket) = self.sockets.get_mut(index) else {
                continue;
            };
            socket.take(room);
            let bytes = std::mem::take(&mut socket.inbox);
            let (over, reset) = (
                socket.server_finished && socket.sent.is_empty(),
                socket.server_reset,
            );
            if let Some(other) = self.sockets.get_mut(other) {
                other.underway.extend(bytes);
                other.client_finished |= over;
                if reset && other.error.is_none() {
                    other.client_gone = true;
                    other.die(libc::ECONNRESET);
                }
            }
        }
    }

    /// The time at which the next attempt ends.
    pub(super) fn next_answer(&self) -> Time {
        let held = self
            .dialing
            .iter()
            .filter_map(|&index| self.sockets.get(index));
        let dials = held.filter_map(|socket| match socket.dial {
            Dial::Until(at, _) if socket.held && socket.error.is_none() => Some(at),
            _ => None,
        });
        dials.fold(Time::NEVER, Time::min)
    }
}

//! A handler for outgoing connections that tells a test all it hears, and a socket to adopt.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use portcullis::{CloseReason, Closed, Conn, ConnId, Context, Handler, Outcome};
use socket2::{Domain, Socket, Type};

use crate::net::PATIENCE;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    Opened(ConnId),
    Secured,
    Frame(Vec<u8>),
    Finished,
    Closed(CloseReason),
    /// With the errno, if that is what is behind it.
    Failed(CloseReason, Option<i32>),
}

/// Tells what it hears, with the words of errors, and does nothing else.
pub struct Probe {
    told: Sender<(Told, String)>,
    /// The peer's end is not ours.
    half_closes: bool,
}

/// What a [`Probe`] has heard.
pub struct Heard(Receiver<(Told, String)>);

pub fn probe() -> (Probe, Heard) {
    let (told, heard) = mpsc::channel();
    (
        Probe {
            told,
            half_closes: false,
        },
        Heard(heard),
    )
}

/// One that does not close when its peer has finished.
pub fn half_closing_probe() -> (Probe, Heard) {
    let (mut probe, heard) = probe();
    probe.half_closes = true;
    (probe, heard)
}

impl Heard {
    #[track_caller]
    pub fn next(&self) -> Told {
        self.next_with_words().0
    }

    #[track_caller]
    pub fn next_with_words(&self) -> (Told, String) {
        self.0.recv_timeout(PATIENCE).expect("it hears something")
    }

    #[track_caller]
    pub fn opened(&self) -> ConnId {
        match self.next() {
            Told::Opened(id) => id,
            other => panic!("{other:?}"),
        }
    }

    /// The next frames until there are so many bytes.
    #[track_caller]
    pub fn bytes(&self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            match self.next() {
                Told::Frame(frame) => bytes.extend(frame),
                other => panic!("{other:?}"),
            }
        }
        bytes
    }

    /// Whatever was heard already.
    pub fn so_far(&self) -> Vec<Told> {
        self.0.try_iter().map(|(told, _)| told).collect()
    }

    /// Its handler is gone, and there is nothing more.
    #[track_caller]
    pub fn is_all(&self) {
        match self.0.recv_timeout(PATIENCE) {
            Err(mpsc::RecvTimeoutError::Disconnected) => {}
            other => panic!("{other:?}"),
        }
    }
}

impl Probe {
    fn tell(&self, told: Told, words: String) {
        // A test that has seen enough listens no more.
        let _ = self.told.send((told, words));
    }
}

impl<A> Handler<A> for Probe {
    fn on_open(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        self.tell(Told::Opened(cx.conn.id()), String::new());
        Ok(())
    }

    fn on_secured(&mut self, _: &mut Context<'_, A>) -> Outcome {
        self.tell(Told::Secured, String::new());
        Ok(())
    }

    fn on_frame(&mut self, _: &mut Context<'_, A>, frame: &[u8]) -> Outcome {
        self.tell(Told::Frame(frame.to_vec()), String::new());
        Ok(())
    }

    fn on_finish(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        self.tell(Told::Finished, String::new());
        if !self.half_closes {
            cx.conn.close_after_input();
        }
        Ok(())
    }

    fn on_close(&mut self, _: &mut Context<'_, A>, closed: &Closed) {
        self.tell(Told::Closed(closed.reason), closed.to_string());
    }

    fn on_connect_failed(&mut self, _: &mut Context<'_, A>, closed: &Closed) {
        let error = closed
            .error
            .as_ref()
            .and_then(|error| error.downcast_ref::<io::Error>());
        let errno = error.and_then(io::Error::raw_os_error);
        self.tell(Told::Failed(closed.reason, errno), closed.to_string());
    }
}

/// A listener of the standard library, on a port of its own.
#[track_caller]
pub fn std_listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = listener.local_addr().expect("bound");
    (listener, addr)
}

/// A connected client, with bounded waits.
#[track_caller]
pub fn accepted(listener: &TcpListener) -> TcpStream {
    let (stream, _) = listener.accept().expect("accept");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

/// Address of a port without a listener.
#[track_caller]
pub fn closed_addr() -> SocketAddr {
    std_listener().1
}

/// A listener whose backlog is full: a connect gets no reply. Linux drops the SYN then
/// (`tcp_conn_request`).
pub struct Full {
    pub addr: SocketAddr,
    _listener: Socket,
    _waiting: Vec<Socket>,
}

#[track_caller]
pub fn full_listener() -> Full {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    listener.bind(&any.into()).expect("bind");
    listener.listen(0).expect("listen");
    let addr = listener
        .local_addr()
        .expect("bound")
        .as_socket()
        .expect("TCP");
    let mut waiting = Vec::new();
    loop {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
        // The first is accepted at once, later ones never.
        let connected = socket.connect_timeout(&addr.into(), Duration::from_millis(200));
        waiting.push(socket);
        if connected.is_err() {
            break;
        }
        assert!(waiting.len() < 10, "the backlog is never full");
    }
    Full {
        addr,
        _listener: listener,
        _waiting: waiting,
    }
}

/// The connection with this id, in a job.
#[track_caller]
pub fn with_conn<A, R>(
    control: &mut portcullis::Control<'_, A>,
    id: ConnId,
    act: impl FnOnce(&mut Conn<'_, A>) -> R,
) -> R {
    act(&mut control.conn(id).expect("it is there"))
}

thread_local! {
    static CONNECTED: (TcpStream, TcpStream) = {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("an address"));
        (client.expect("connected"), listener.accept().expect("a client").0)
    };
}

/// A copy of a connected socket, the same one for all calls of a thread: the simulator does no more than look at it.
pub fn connected_socket() -> TcpStream {
    CONNECTED.with(|(_, accepted)| accepted.try_clone().expect("a copy"))
}

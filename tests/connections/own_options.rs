//! A handler changes the options of its connection, or of another one: they apply at once, to that
//! connection alone.

use std::net::SocketAddr;
use std::time::Duration;

use kit::net::{connect, local, packet2, recv2, send2, spawn};
use portcullis::sim::{ClientId, Sim};
use portcullis::{
    CloseReason, Config, Conn, ConnId, Context, Error, Framing, Handler, Listen, Outcome, Server,
};
use socket2::SockRef;

/// The first byte of a frame says how many seconds the connection may be idle. Zero is for the
/// connection that came before, which gets ten.
struct Broker;

impl Handler<Vec<ConnId>> for Broker {
    fn on_open(&mut self, cx: &mut Context<'_, Vec<ConnId>>) -> Outcome {
        cx.app.push(cx.conn.id());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Vec<ConnId>>, frame: &[u8]) -> Outcome {
        let seconds = frame.first().copied().unwrap_or_default();
        if seconds > 0 {
            keep(&mut cx.conn, u64::from(seconds))?;
        } else if let Some(mut first) = cx.conn.peer(cx.app[0]) {
            keep(&mut first, 10)?;
        }
        cx.conn.send("kept")?;
        Ok(())
    }
}

fn keep(conn: &mut Conn<'_, Vec<ConnId>>, seconds: u64) -> portcullis::Result<()> {
    conn.reconfigure(|conn| conn.idle_timeout = Duration::from_secs(seconds))
}

fn world() -> (Sim<Vec<ConnId>>, SocketAddr) {
    let mut sim = Sim::new(1, Config::new(), Vec::new());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet1)
        .with(|listen| listen.conn.linger_timeout = Duration::ZERO);
    let addr = sim.listen(listen, |_: &mut Vec<ConnId>, _| Broker);
    (sim, addr.expect("a listener"))
}

fn client(sim: &mut Sim<Vec<ConnId>>, addr: SocketAddr, seconds: &[u8]) -> ClientId {
    let client = sim.connect(addr).expect("a listener");
    for &seconds in seconds {
        sim.send(client, &[1, seconds]);
    }
    sim.settle();
    client
}

fn idle_ends(sim: &Sim<Vec<ConnId>>) -> u64 {
    sim.stats().closed(CloseReason::IdleTimeout)
}

/// Each client of a broker chooses its keepalive time.
#[test]
fn each_connection_has_its_own_idle_timeout() {
    let (mut sim, addr) = world();
    client(&mut sim, addr, &[20]);
    client(&mut sim, addr, &[200]);
    client(&mut sim, addr, &[]);
    // The last choice counts.
    client(&mut sim, addr, &[200, 5, 40]);
    for (seconds, ended) in [(19, 0), (1, 1), (19, 1), (1, 2), (79, 2), (1, 3), (80, 4)] {
        sim.advance(Duration::from_secs(seconds));
        assert_eq!(idle_ends(&sim), ended, "at {:?}", sim.now());
    }
}

/// It rests, so that nothing else would look at its deadline before.
#[test]
fn another_connection_is_woken_for_it() {
    let (mut sim, addr) = world();
    client(&mut sim, addr, &[]);
    sim.advance(Duration::from_secs(3));
    client(&mut sim, addr, &[0]);
    sim.advance(Duration::from_secs(6));
    assert_eq!(idle_ends(&sim), 0);
    sim.advance(Duration::from_secs(1));
    assert_eq!(idle_ends(&sim), 1);
}

/// A job between two iterations may do so too, reads them back, and gets an error for what is
/// gone or makes no sense.
#[test]
fn a_job_reads_and_changes_them() {
    let (mut sim, addr) = world();
    let client = client(&mut sim, addr, &[30]);
    let id = sim.app()[0];
    let mut control = sim.control();
    let mut conn = control.conn(id).expect("it is there");
    let idle = |conn: &Conn<'_, Vec<ConnId>>| conn.config().map(|conn| conn.idle_timeout);
    assert_eq!(idle(&conn), Some(Duration::from_secs(30)));
    let refused = conn.reconfigure(|conn| conn.idle_timeout = Duration::ZERO);
    assert!(matches!(
        refused,
        Err(Error::Option {
            option: "idle_timeout",
            ..
        })
    ));
    assert_eq!(idle(&conn), Some(Duration::from_secs(30)));
    keep(&mut conn, 2).expect("it is open");
    conn.close();
    assert!(matches!(keep(&mut conn, 3), Err(Error::ConnState(_))));
    sim.settle();
    sim.finish(client);
    sim.settle();
    assert_eq!(sim.stats().closed(CloseReason::Closed), 1);
}

/// Sets an option that the library always sets otherwise, and answers with what it reads.
struct Delays;

impl Handler for Delays {
    fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
        let fd = cx.conn.fd()?;
        let socket = SockRef::from(&fd);
        let before = socket.tcp_nodelay()?;
        socket.set_tcp_nodelay(false)?;
        let after = socket.tcp_nodelay()?;
        cx.conn.send(format!("{before} {after}"))?;
        Ok(())
    }
}

#[test]
fn a_handler_sets_an_option_of_its_socket() {
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(local(), |_: &mut (), _| Delays)
            .expect("listen");
        (server, ())
    });
    let mut client = connect(server.addr());
    send2(&mut client, b"delay");
    assert_eq!(recv2(&mut client), b"true false");
    // A simulated socket has none.
    let mut sim = Sim::new(1, Config::new(), ());
    let addr = sim.listen(local(), |_: &mut (), _| Delays).expect("listen");
    let client = sim.connect(addr).expect("a listener");
    sim.send(client, &packet2(b"delay"));
    sim.settle();
    assert_eq!(sim.received(client), b"");
}

//! A framer that panics ends its own connection, from any caller; the server goes on.

use std::io::Write;
use std::net::TcpStream;

use kit::net::{await_end, connect, local, read_to_end, spawn_echo, Running};
use portcullis::sim::Sim;
use portcullis::{
    CloseReason, Config, Connect, Decoded, Error, FrameBuf, FrameError, Framer, Framing,
};

/// One byte is one frame. Some bytes are its undoing.
struct Brittle;

impl Framer for Brittle {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        assert_ne!(input[0], b'!', "as this test wants it");
        Ok(Decoded::Frame {
            payload: 0..1,
            consumed: 1,
        })
    }

    fn pack(&mut self, payload: &[&[u8]], out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        out.put(b"<");
        assert_ne!(payload, [b"?"], "as this test wants it");
        payload.iter().for_each(|part| out.put(part));
        Ok(true)
    }
}

fn brittle() -> Running {
    spawn_echo(
        Config::new(),
        local().with(|listen| listen.framing = Framing::custom(|| Brittle)),
    )
}

/// One connection has ended as Panicked, and others are served as before.
#[track_caller]
fn lives(server: Running, client: TcpStream) {
    drop(client);
    server.until("it is counted", |stats| {
        stats.closed(CloseReason::Panicked) == 1
    });
    let mut other = connect(server.addr());
    other.write_all(b"x").expect("send");
    other.shutdown(std::net::Shutdown::Write).expect("finish");
    assert_eq!(read_to_end(&mut other), b"<x");
    server.finish();
}

#[test]
fn in_decode() {
    let server = brittle();
    let mut client = connect(server.addr());
    client.write_all(b"ab!c").expect("send");
    assert_eq!(
        read_to_end(&mut client),
        b"<a<b",
        "the frames before it were answered"
    );
    lives(server, client);
}

#[test]
fn in_encode_called_by_a_handler() {
    let server = brittle();
    let mut client = connect(server.addr());
    client.write_all(b"a?").expect("send");
    assert_eq!(read_to_end(&mut client), b"<a", "and no half frame");
    lives(server, client);
}

#[test]
fn in_encode_called_through_a_handle() {
    let server = brittle();
    let mut client = connect(server.addr());
    let id = loop {
        let connections = server.ask(|(), control| control.connections());
        if let Some(connection) = connections.first() {
            break connection.id;
        }
    };
    server.handle.send(id, b"?".as_slice()).expect("queued");
    assert_eq!(read_to_end(&mut client), b"", "and no half frame");
    lives(server, client);
}

#[test]
fn while_it_is_made() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let first = AtomicBool::new(true);
    let framing = Framing::custom(move || {
        assert!(
            !first.swap(false, Ordering::Relaxed),
            "as this test wants it"
        );
        Brittle
    });
    let server = spawn_echo(
        Config::new(),
        local().with(|listen| listen.framing = framing),
    );
    let mut client = connect(server.addr());
    await_end(&mut client);
    lives(server, client);
}

/// The maker of an outgoing connection's framer is dropped with the connection, which is counted
/// once all the same.
#[test]
fn in_the_makers_destructor_of_an_outgoing_connection() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            kit::planned::blow();
        }
    }

    let mut sim = Sim::new(1, Config::new(), ());
    let addr = sim
        .listen(local(), |_: &mut (), _: portcullis::Peer| kit::net::Echo)
        .expect("listens");
    let bomb = Bomb;
    let maker = move || {
        let _ = &bomb;
        Brittle
    };
    let connect = Connect::new(Framing::custom(maker));
    let id = sim.control().connect(addr, connect, kit::net::Echo);
    let stats = sim.stats();
    assert_eq!((stats.open, stats.connecting), (1, 1));
    sim.settle();
    let id = id.expect("begun");
    assert!(sim.control().kill(id));
    sim.advance(std::time::Duration::from_secs(5));
    let stats = sim.stats();
    assert_eq!((stats.panics, stats.open, stats.connecting), (1, 0, 0));
}

/// An attempt that gets no slot is an error, whatever its framer's destructor does.
#[test]
fn in_the_destructor_for_an_outgoing_connection_without_a_slot() {
    struct Bomb(Brittle);
    impl Framer for Bomb {
        fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
            self.0.decode(input)
        }
    }
    impl Drop for Bomb {
        fn drop(&mut self) {
            kit::planned::blow();
        }
    }

    let mut sim = Sim::new(1, Config::max_connections(0), ());
    let connect = Connect::new(Framing::custom(|| Bomb(Brittle)));
    let addr = std::net::SocketAddr::from(([192, 0, 2, 1], 7));
    let refused = sim.control().connect(addr, connect, kit::net::Echo);
    assert!(
        matches!(refused, Err(Error::AtCapacity { .. })),
        "{refused:?}"
    );
    assert_eq!(sim.stats().panics, 1);
}

/// Received bytes are cut in the new framing all the same.
#[test]
fn in_the_destructor_of_one_that_is_replaced_by_a_job() {
    struct Bomb;
    impl Framer for Bomb {
        fn decode(&mut self, _: &[u8]) -> Result<Decoded, FrameError> {
            Ok(Decoded::More)
        }
    }
    impl Drop for Bomb {
        fn drop(&mut self) {
            kit::planned::blow();
        }
    }

    let mut sim = Sim::new(1, Config::new(), ());
    let listen = local().with(|listen| listen.framing = Framing::custom(|| Bomb));
    let addr = sim
        .listen(listen, |_: &mut (), _: portcullis::Peer| kit::net::Echo)
        .expect("listens");
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, b"a line\n");
    sim.settle();
    let id = sim.control().connections()[0].id;
    let job = move |(): &mut (), control: &mut portcullis::Control<'_>| {
        if let Some(mut conn) = control.conn(id) {
            conn.set_framing(&Framing::Line);
        }
    };
    sim.handle().post(job).expect("there is room");
    sim.settle();
    assert_eq!(sim.received(client), b"a line\n");
    assert_eq!(sim.stats().panics, 1);
}

/// A maker that panics makes an error, and the handler's destructor may panic as well.
#[test]
fn in_the_maker_of_an_outgoing_connection() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            kit::planned::blow();
        }
    }
    impl portcullis::Handler for Bomb {
        fn on_frame(&mut self, _: &mut portcullis::Context<'_>, _: &[u8]) -> portcullis::Outcome {
            Ok(())
        }
    }

    let mut sim = Sim::new(1, Config::new(), ());
    let make = || -> Brittle { kit::planned::blow() };
    let connect = Connect::new(Framing::custom(make));
    let addr = std::net::SocketAddr::from(([192, 0, 2, 1], 7));
    let failed = sim.control().connect(addr, connect, Bomb);
    assert!(matches!(failed, Err(Error::ConnState(_))), "{failed:?}");
    let stats = sim.stats();
    assert_eq!((stats.panics, stats.outgoing, stats.open), (2, 0, 0));
}

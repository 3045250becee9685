//! A framer that panics ends its own connection, from any caller; the server goes on.

use std::io::Write;
use std::net::TcpStream;

use kit::net::{await_end, connect, local, read_to_end, spawn_echo, Running};
use portcullis::{CloseReason, Config, Decoded, FrameBuf, FrameError, Framer, Framing};

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

    fn pack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<bool, FrameError> {
        out.put(b"<");
        assert_ne!(payload, b"?", "as this test wants it");
        out.put(payload);
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

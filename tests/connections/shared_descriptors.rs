//! Another owner of a connection's socket, such as a forked child, may make it blocking: no call of the loop waits all
//! the same.

use std::io::Write;
use std::os::fd::OwnedFd;

use kit::net::{connect, local, ping, spawn, Running};
use portcullis::{Config, Context, Framing, Handler, Outcome, Server};
use socket2::SockRef;

/// More than any socket buffer takes here.
const MUCH: usize = 32 << 20;

/// "b" makes its socket blocking through a second descriptor, "w" writes more than the peer takes, and everything else
/// is echoed.
struct Shares;

impl Handler<Vec<OwnedFd>> for Shares {
    fn on_frame(&mut self, cx: &mut Context<'_, Vec<OwnedFd>>, frame: &[u8]) -> Outcome {
        match frame {
            b"b" => {
                let other = cx.conn.fd()?.try_clone_to_owned()?;
                SockRef::from(&other).set_nonblocking(false)?;
                cx.app.push(other);
                cx.conn.set_framing(&Framing::Raw);
                cx.conn.send("shared")?;
            }
            b"w" => {
                let all = vec![0; MUCH];
                cx.conn.send(&all)?;
                cx.conn.send(&all)?;
            }
            frame if frame.len() < 100 => cx.conn.send(frame)?,
            _ => {}
        }
        Ok(())
    }
}

fn server() -> Running<Vec<OwnedFd>> {
    spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        let listen = local().with(|listen| {
            listen.framing = Framing::Packet2;
            listen.conn.output_limit = 3 * MUCH;
        });
        server
            .listen(listen, |_: &mut Vec<OwnedFd>, _| Shares)
            .expect("listen");
        (server, Vec::new())
    })
}

#[test]
fn a_read_that_finds_nothing_does_not_wait() {
    let server = server();
    let mut shared = connect(server.addr());
    shared.write_all(b"\0\x01b").expect("sent");
    let mut answer = [0; 6];
    std::io::Read::read_exact(&mut shared, &mut answer).expect("shared");
    let mut other = connect(server.addr());
    // Reads that are filled to the last byte are followed by another.
    for size in [4096, 16 * 1024, 64 * 1024, 256 * 1024] {
        shared.write_all(&vec![0; size]).expect("sent");
        ping(&mut other, b"still served");
    }
}

#[test]
fn a_write_that_finds_no_room_does_not_wait() {
    let server = server();
    let mut shared = connect(server.addr());
    shared.write_all(b"\0\x01b").expect("sent");
    let mut answer = [0; 6];
    std::io::Read::read_exact(&mut shared, &mut answer).expect("shared");
    shared.write_all(b"w").expect("sent");
    let mut other = connect(server.addr());
    ping(&mut other, b"still served");
}

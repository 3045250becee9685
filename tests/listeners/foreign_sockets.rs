//! A listening socket that another process uses, or has made, blocks no system call of the loop.

use std::io::Write;
use std::net::TcpListener;
#[cfg(any(target_os = "linux", target_os = "android"))]
use std::os::fd::AsFd;
use std::time::Duration;

use kit::net::{connect, local, packet2, ping, recv2, spawn, ReadSome, Running};
use portcullis::{CloseReason, Config, Context, Framing, Handler, Listen, Outcome, Server};
use socket2::SockRef;

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        match frame {
            b"flood" => {
                for _ in 0..400 {
                    cx.conn.send([0; 10_000])?;
                }
                cx.conn.abort();
            }
            frame => cx.conn.send(frame)?,
        }
        Ok(())
    }
}

/// O_NONBLOCK belongs to the socket: the other owner's mode is not the server's.
#[test]
fn a_shared_listener_that_was_made_blocking_does_not_block_the_loop() {
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        let service = |_: &mut (), _: portcullis::Peer| Echo;
        server
            .listen(
                local()
                    .name("shared")
                    .with(|listen| listen.framing = Framing::Packet2),
                service,
            )
            .expect("listen");
        (server, ())
    });
    let shared = server.ask(|(), control| control.listener_socket("shared").expect("shared"));
    let other = TcpListener::from(shared);
    for round in 0..3 {
        other.set_nonblocking(false).expect("blocking");
        // Each accept finds the backlog empty behind its client, where a blocking one would stay.
        let mut client = connect(server.addr());
        ping(&mut client, format!("round {round}").as_bytes());
    }
}

fn adopting(listener: TcpListener) -> Running<()> {
    spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        let listen = Listen::adopted(listener, Framing::Packet2);
        let service = |_: &mut (), _: portcullis::Peer| Echo;
        server.listen(listen, service).expect("adopt");
        (server, ())
    })
}

/// Accepted sockets inherit SO_LINGER, with which close waits for the peer.
#[test]
fn an_adopted_listener_with_linger_does_not_block_the_loop() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let linger = Some(Duration::from_secs(3600));
    SockRef::from(&listener).set_linger(linger).expect("linger");
    let server = adopting(listener);
    // A peer that reads nothing, and a connection that ends with output in the kernel.
    let mut slow = connect(server.addr());
    slow.write_all(&packet2(b"flood")).expect("send");
    server.until("it has ended", |stats| {
        stats.closed(CloseReason::Aborted) == 1
    });
    let mut orderly = connect(server.addr());
    orderly.write_all(&packet2(b"hello")).expect("send");
    assert_eq!(recv2(&mut orderly), b"hello");
    orderly.shutdown(std::net::Shutdown::Write).expect("FIN");
    assert_eq!(orderly.read_some(&mut [0; 1]).expect("FIN"), 0);
    ping(&mut connect(server.addr()), b"served");
}

#[cfg(any(target_os = "linux", target_os = "android"))]
#[derive(Clone, Copy)]
struct ReceiveLowMark;

#[cfg(any(target_os = "linux", target_os = "android"))]
nix::setsockopt_impl!(
    ReceiveLowMark,
    libc::SOL_SOCKET,
    libc::SO_RCVLOWAT,
    libc::c_int,
    nix::sys::socket::sockopt::SetStruct<'_, libc::c_int>
);

/// Accepted sockets inherit SO_RCVLOWAT, which hides short frames from the poll, TCP_CORK, which
/// keeps short answers back, and SO_OOBINLINE, which mixes urgent bytes with the stream.
#[cfg(any(target_os = "linux", target_os = "android"))]
#[test]
fn what_an_adopted_listener_hands_down_changes_no_reading_and_no_writing() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    nix::sys::socket::setsockopt(&listener.as_fd(), ReceiveLowMark, &100_000).expect("low mark");
    let options = SockRef::from(&listener);
    options.set_tcp_cork(true).expect("cork");
    options.set_out_of_band_inline(true).expect("inline");
    let server = adopting(listener);
    let mut client = connect(server.addr());
    ping(&mut client, b"short");
    SockRef::from(&client)
        .send_out_of_band(b"!")
        .expect("an urgent byte");
    ping(&mut client, b"behind the urgent byte");
}

/// An MPTCP socket has not all options of a TCP socket.
#[cfg(target_os = "linux")]
#[test]
fn clients_of_an_adopted_mptcp_listener_are_served() {
    use socket2::{Domain, Protocol, Socket, Type};

    let socket = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP));
    let Ok(listener) = socket() else {
        eprintln!("SKIPPED: the kernel has no MPTCP, this test did not run");
        return;
    };
    let any_port = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    listener.bind(&any_port.into()).expect("bind");
    listener.listen(16).expect("listen");
    let server = adopting(listener.into());
    let client = socket().expect("MPTCP");
    client.connect(&server.addr().into()).expect("connect");
    let timeout = Some(kit::net::PATIENCE);
    client.set_read_timeout(timeout).expect("timeout");
    let mut client = std::net::TcpStream::from(client);
    ping(&mut client, b"over MPTCP");
    client.shutdown(std::net::Shutdown::Write).expect("FIN");
    assert_eq!(client.read_some(&mut [0; 1]).expect("FIN"), 0);
    ping(&mut connect(server.addr()), b"over TCP");
}

//! Sockets as the kernel makes them, without a server.

use std::io::{Read as _, Write as _};
use std::time::Instant;

use super::*;

fn options() -> SocketOptions {
    SocketOptions {
        send_buffer: Some(100_000),
        ..SocketOptions::default()
    }
}

/// Waits for up to 30 seconds.
fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "not within 30 s");
        std::thread::yield_now();
    }
}

fn unless_blocked<T>(result: io::Result<T>) -> Option<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        result => Some(result.expect("no other error")),
    }
}

fn accepted(os: &mut MioOs, listener: &mut Listener) -> Stream {
    eventually(|| unless_blocked(os.accept(listener))).0
}

/// Reads from a non-blocking stream.
fn read(os: &mut MioOs, stream: &mut Stream) -> Vec<u8> {
    let mut buffer = [0; 16];
    let count = eventually(|| unless_blocked(os.read(stream, &mut buffer)));
    buffer[..count].to_vec()
}

#[cfg(any(target_os = "linux", target_os = "android"))]
#[test]
fn an_abstract_name_is_listened_on_and_connected_to() {
    let mut os = MioOs::new().expect("a poll");
    let name = format!("portcullis-{}-{:x}", std::process::id(), os.random());
    let addr = Addr::Unix(UnixAddr::abstract_name(name.as_bytes()));
    let mut listener = os.listen(&addr, None, &options()).expect("it is free");
    assert_eq!(os.listener_addr(&listener).ok(), Some(addr.clone()));
    let (mut ours, connected) = os.connect(&addr, None, &options()).expect("it listens");
    assert!(connected);
    let mut theirs = accepted(&mut os, &mut listener);
    os.write(&mut ours, b"hello").expect("written");
    assert_eq!(read(&mut os, &mut theirs), b"hello");
    for stream in [&ours, &theirs] {
        let Stream::Unix(stream) = stream else {
            panic!("a Unix socket");
        };
        let bytes = SockRef::from(stream).send_buffer_size().expect("known");
        assert!(bytes >= 100_000, "{bytes}");
    }
}

/// The address of a peer that has no name.
#[test]
fn without_a_name_nothing_listens_or_connects() {
    let mut os = MioOs::new().expect("a poll");
    let addr = Addr::Unix(UnixAddr::unnamed());
    let listened = os.listen(&addr, None, &options()).map(drop);
    let connected = os.connect(&addr, None, &options()).map(drop);
    for refused in [listened, connected] {
        let error = refused.expect_err("it has no name");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}

/// Only TCP has acknowledgements. What a Unix socket's peer has not read is unsent instead.
#[cfg(target_os = "linux")]
#[test]
fn what_a_peer_has_taken_is_known_of_tcp() {
    let mut os = MioOs::new().expect("a poll");
    let local = Addr::Tcp(([127, 0, 0, 1], 0).into());
    let mut listener = os.listen(&local, None, &options()).expect("a port");
    let addr = os.listener_addr(&listener).expect("known");
    let Addr::Tcp(tcp) = addr else {
        panic!("a port");
    };
    let mut client = std::net::TcpStream::connect(tcp).expect("it listens");
    let mut stream = accepted(&mut os, &mut listener);
    let patience = Some(Duration::from_secs(30));
    client.set_read_timeout(patience).expect("set");
    client.write_all(b"hi").expect("written");
    assert_eq!(read(&mut os, &mut stream), b"hi");
    os.write(&mut stream, b"hello").expect("written");
    client.read_exact(&mut [0; 5]).expect("all of it");
    eventually(|| os.has_taken(&mut stream, 5).filter(|&taken| taken));
    assert_eq!(os.has_taken(&mut stream, 6), Some(false));
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let (mut unix, _) = os.adopt_stream(ours.into(), &options()).expect("adopted");
    assert_eq!(os.has_taken(&mut unix, 0), None);
    assert_eq!(os.unsent(&mut unix), Some(0));
}

/// Then one shard's clients come from a backlog that the others do not have.
#[test]
fn a_socket_that_one_shard_has_adopted_is_its_own() {
    let shared = Arc::new(SharedListenSockets::default());
    let mut shards = [(); 2].map(|()| MioOs::new().expect("a poll"));
    let local = Addr::Tcp(([127, 0, 0, 1], 0).into());
    for adopts in [false, true] {
        let listeners = shards.each_mut().map(|os| {
            os.share_listen_sockets(Arc::clone(&shared));
            os.listen(&local, None, &options()).expect("a port")
        });
        let addrs = listeners.each_ref().map(|one| one.local_addr().ok());
        assert_eq!(addrs[0], addrs[1], "one socket");
        let own = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        if adopts {
            let adopted = shards[0].adopt_listener(own.into());
            assert!(adopted.is_ok());
        }
        assert_eq!(shared.forget(2), !adopts);
    }
}

/// Else the range of local ports would be one for all peers together.
#[cfg(any(target_os = "linux", target_os = "android"))]
#[test]
fn a_local_port_is_chosen_at_connect() {
    for local in ["127.0.0.1:0", "[::1]:0"] {
        let local: SocketAddr = local.parse().expect("an address");
        let Ok(listener) = TcpListener::bind(local) else {
            continue; // without IPv6
        };
        let addr = listener.local_addr().expect("an address");
        let options = SocketOptions::default();
        let (stream, _) = connect_tcp(addr, Some(local), &options).expect("connects");
        assert_eq!(
            nix::sys::socket::getsockopt(&stream, IpBindAddressNoPort),
            Ok(true),
            "{local}"
        );
    }
}

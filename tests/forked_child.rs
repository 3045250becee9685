//! A forked child that drops its copy of a server takes nothing from the parent. One process of its
//! own, because it forks.

#![cfg(any(target_os = "linux", target_os = "android"))]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kit::net::Place;
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{fork, ForkResult};
use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Peer, Server};

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

fn echoes(server: &mut Server, client: &mut (impl Read + Write), line: &[u8]) {
    client.write_all(line).expect("send");
    for _ in 0..20 {
        let timeout = Some(Duration::from_millis(50));
        server.poll_once(&mut (), timeout).expect("poll");
    }
    let mut answer = vec![0; line.len()];
    client.read_exact(&mut answer).expect("an answer");
    assert_eq!(answer, line);
}

#[test]
fn a_child_that_drops_the_server_takes_nothing_from_its_parent() {
    let folder = Place::new();
    let path = folder.path("parent.sock");
    let mut server: Server = Server::new(Config::new()).expect("server");
    let service = |_: &mut (), _: Peer| Echo;
    let tcp = Listen::tcp("127.0.0.1:0")
        .framing(Framing::Line)
        .name("tcp");
    server.listen(tcp, service).expect("listen");
    let unix = Listen::unix(&path).framing(Framing::Line).name("unix");
    server.listen(unix, service).expect("listen");
    let info = server.control().listener("tcp").expect("open");
    let addr = info.addr.as_tcp().expect("TCP");
    let connect = || {
        let client = TcpStream::connect(addr).expect("connect");
        let timeout = Some(Duration::from_secs(10));
        client.set_read_timeout(timeout).expect("timeout");
        client
    };
    let mut before = connect();
    echoes(&mut server, &mut before, b"before the fork\n");
    // SAFETY: the child only drops the server and exits.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            let closed = server.control().close_listener("tcp").is_ok();
            drop(server);
            std::process::exit(i32::from(!closed));
        }
        ForkResult::Parent { child } => {
            let ended = waitpid(child, None).expect("wait");
            assert_eq!(ended, WaitStatus::Exited(child, 0));
        }
    }
    echoes(&mut server, &mut before, b"an old connection\n");
    echoes(&mut server, &mut connect(), b"a new connection\n");
    let mut unix = UnixStream::connect(&path).expect("the file is there");
    echoes(&mut server, &mut unix, b"over the Unix socket\n");
}

//! What the owner of a real server gives it replays, too.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{Ending, Replay, Tape};
use crate::alarm::Alarm;
use crate::config::{Config, Connect, Listen, Quota};
use crate::handler::{Context, Control, Handler, Interest};
use crate::id::ListenerId;
use crate::proto::Framing;
use crate::reason::{Closed, Outcome};
use crate::record::{Payloads, Recording};
use crate::server::Server;

type Words = Vec<String>;

const PATIENCE: Duration = Duration::from_secs(30);

struct Echo;

impl Handler<Words> for Echo {
    fn on_open(&mut self, cx: &mut Context<'_, Words>) -> Outcome {
        // A replay has none.
        let _ = cx.conn.fd();
        let addr = cx.conn.local_addr()?;
        cx.app.push(format!("{addr} opens"));
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Words>, line: &[u8]) -> Outcome {
        cx.app.push(line.escape_ascii().to_string());
        cx.conn.send(line)?;
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Words>, closed: &Closed) {
        cx.app.push(closed.to_string());
    }
}

fn listener() -> (Listen, std::net::SocketAddr) {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = socket.local_addr().expect("known");
    (Listen::adopted(socket, Framing::Line), addr)
}

/// Gives a server one end of a pair, a descriptor to watch, and an alarm. Returns the other ends.
fn give(control: &mut Control<'_, Words>) -> [UnixStream; 2] {
    let (ours, client) = UnixStream::pair().expect("a pair");
    let options = Connect::new(Framing::Line);
    control.adopt(ours, options, Echo).expect("adopted");
    let (watched, other) = UnixStream::pair().expect("a pair");
    let watch = control.watch(watched, Interest::Readable, |app: &mut Words, _, _| {
        app.push("watched".to_owned())
    });
    watch.expect("watched");
    let half = Alarm::Descriptors(Quota::Percent(50));
    let alarm = control.on_alarm(half, Duration::from_secs(1), |_, _, _| {});
    alarm.expect("set");
    [client, other]
}

fn suspend(control: &mut Control<'_, Words>, listener: ListenerId) {
    control.suspend(listener).expect("open");
    control.resume(listener).expect("open");
}

/// Runs until so many words are recorded, for up to 30 seconds.
fn run_until(server: &mut Server<Words>, recorded: &mut Words, count: usize) {
    let end = Instant::now() + PATIENCE;
    while recorded.len() < count {
        assert!(Instant::now() < end, "{recorded:?}");
        let timeout = Some(Duration::from_secs(1));
        server.poll_once(recorded, timeout).expect("it runs");
    }
}

#[test]
fn what_an_owner_gives_a_server_replays() {
    let folder = std::env::temp_dir().join(format!("owner-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let file = folder.join("server.rec");
    let recording = Recording::new(&file).with(|recording| recording.payloads = Payloads::Kept);
    let mut recorded = Words::new();
    let mut server = Server::recorded(Config::new(), recording).expect("a recording");
    let (listen, addr) = listener();
    let id = server
        .listen(listen, |_: &mut Words, _| Echo)
        .expect("adopted");
    suspend(&mut server.control(), id);
    let [mut client, mut other] = give(&mut server.control());
    client.set_read_timeout(Some(PATIENCE)).expect("set");
    client.write_all(b"hello\n").expect("written");
    let mut over_tcp = TcpStream::connect(addr).expect("it listens");
    over_tcp.set_read_timeout(Some(PATIENCE)).expect("set");
    over_tcp.write_all(b"hi\n").expect("written");
    run_until(&mut server, &mut recorded, 4);
    client.read_exact(&mut [0; 6]).expect("answered");
    over_tcp.read_exact(&mut [0; 3]).expect("answered");
    // Behind everything that it was sent.
    reset(over_tcp);
    run_until(&mut server, &mut recorded, 5);
    other.write_all(b"!").expect("written");
    run_until(&mut server, &mut recorded, 6);
    let stats = server.control().stats();
    drop(server);

    let tape = Tape::read(&file).expect("a recording");
    let mut replay = Replay::new(tape, Config::new(), Words::new()).expect("it is whole");
    let (listen, _) = listener();
    let id = replay
        .listen(listen, |_: &mut Words, _| Echo)
        .expect("as recorded");
    suspend(&mut replay.control(), id);
    let _ends = give(&mut replay.control());
    assert_eq!(replay.run(), Ok(Ending::Complete));
    assert_eq!(replay.app(), &recorded);
    assert_eq!(replay.stats(), stats);
    std::fs::remove_dir_all(folder).expect("removed");
}

fn reset(stream: TcpStream) {
    let socket = socket2::SockRef::from(&stream);
    socket.set_linger(Some(Duration::ZERO)).expect("set");
}

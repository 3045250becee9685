//! A handler that blocks delays others, and expires no deadline that had not begun.

use std::io::Read;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use kit::net::{connect, local, send2, tcp, PATIENCE};
use portcullis::{Config, Context, Handler, Listen, Outcome, Server};

/// The limit, and how long the handler blocks.
const TIME: Duration = Duration::from_secs(2);

fn block() {
    let begun = Instant::now();
    while begun.elapsed() <= TIME {
        thread::park_timeout(TIME);
    }
}

/// A server and its only client, whose one frame is on its way.
fn world<H: Handler + Clone + 'static>(listen: Listen, handler: H) -> (Server, TcpStream) {
    let mut server = Server::new(Config::new()).expect("server");
    server
        .listen(listen, move |_: &mut (), _| handler.clone())
        .expect("listen");
    let mut client = connect(tcp(&server.control().listeners()[0].addr));
    send2(&mut client, b"go");
    while server.control().stats().traffic.frames_in == 0 {
        server.poll_once(&mut (), Some(PATIENCE)).expect("a turn");
    }
    // Whatever is judged at once is judged here.
    for _ in 0..3 {
        server
            .poll_once(&mut (), Some(Duration::ZERO))
            .expect("a turn");
    }
    (server, client)
}

const MUCH: usize = 16 * 1024 * 1024;

#[derive(Clone)]
struct Answers;

impl Handler for Answers {
    fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
        block();
        for _ in 0..MUCH / 0x4000 {
            cx.conn.send([b'x'; 0x4000])?;
        }
        cx.conn.close_after_input();
        Ok(())
    }
}

/// The peer has its time to take what waits for it from when it could.
#[test]
fn the_write_timeout_begins_with_the_write() {
    let listen = local().with(|listen| {
        listen.conn.write_timeout = TIME;
        listen.conn.output_limit = 2 * MUCH;
        listen.conn.low_watermark = MUCH;
        listen.conn.high_watermark = 2 * MUCH;
    });
    let (mut server, mut client) = world(listen, Answers);
    assert!(server
        .control()
        .connections()
        .first()
        .is_some_and(|info| info.queued > 0));
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).map(|_| all.len())
    });
    while server.control().stats().open > 0 {
        server
            .poll_once(&mut (), Some(Duration::from_millis(10)))
            .expect("a turn");
    }
    let count = reader.join().expect("the reader").expect("an orderly end");
    assert_eq!(count, MUCH / 0x4000 * 0x4002);
}

#[cfg(feature = "tls")]
#[derive(Clone)]
struct Upgrades(std::sync::Arc<portcullis::tls::rustls::ServerConfig>);

#[cfg(feature = "tls")]
impl Handler for Upgrades {
    fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
        block();
        cx.conn.send("go ahead")?;
        cx.conn.start_tls(std::sync::Arc::clone(&self.0))?;
        Ok(())
    }
}

/// The handshake has its time from when it was asked for.
#[cfg(feature = "tls")]
#[test]
fn the_handshake_of_an_upgrade_has_its_time() {
    use std::io::Write;

    let site = kit::tls::Site::new();
    let upgrades = Upgrades(std::sync::Arc::new(site.server()));
    let (mut server, mut client) = world(
        local().with(|listen| listen.conn.handshake_timeout = TIME),
        upgrades,
    );
    assert_eq!(kit::net::recv2(&mut client), b"go ahead");
    let states: Vec<_> = server
        .control()
        .connections()
        .iter()
        .map(|info| info.state)
        .collect();
    assert_eq!(states, [portcullis::State::Handshaking]);
    client.write_all(b"no handshake").expect("it is there");
}

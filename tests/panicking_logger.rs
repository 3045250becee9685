//! A logger that panics harms no connection. One process of its own: `log` has one logger.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kit::net::{connect, local, ping, turns_until};
use portcullis::sim::{ClientState, Sim};
use portcullis::{
    CloseReason, Config, Connect, Context, Framing, Handler, Interest, Listen, Outcome, Server,
};

struct Broken;

impl log::Log for Broken {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        assert!(!metadata.target().starts_with("portcullis"), "as planned");
        true
    }

    fn log(&self, _: &log::Record<'_>) {
        panic!("as planned");
    }

    fn flush(&self) {}
}

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        assert_ne!(frame, b"panic\n", "as planned");
        cx.conn.send(frame)?;
        Ok(())
    }
}

fn break_the_logger() {
    // The other test may have done so.
    let _ = log::set_logger(&Broken);
    log::set_max_level(log::LevelFilter::Trace);
}

/// mio writes records too, where a program has its feature `log`.
#[test]
fn a_logger_that_panics_is_not_reached_by_system_calls() {
    break_the_logger();
    let mut server: Server = Server::new(Config::new()).expect("a server");
    let listener = server
        .listen(local(), |_: &mut (), _| Echo)
        .expect("listen");
    let addr = server.control().listener(listener).expect("open").addr;
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let (watched, mut ready) = UnixStream::pair().expect("a pair");
    let options = Connect::new(Framing::Line);
    let mut control = server.control();
    control.adopt(ours, options.clone(), Echo).expect("adopted");
    control
        .connect(addr.clone(), options, Echo)
        .expect("connects");
    let id = control.watch(watched, Interest::Readable, |_, control, _| control.stop());
    let id = id.expect("watched");
    control.suspend(listener).expect("open");
    control.resume(listener).expect("open");
    let addr = addr.as_tcp().expect("TCP");
    let client = std::thread::spawn(move || ping(&mut connect(addr), b"hello"));
    turns_until(&mut server, &mut (), |server, _| {
        server.control().stats().closed_total() > 0
    });
    client.join().expect("an answer");
    ready.write_all(b"x").expect("sent");
    server.run(&mut ()).expect("it is stopped");
    assert!(server.control().unwatch(id));
    assert!(server.control().stats().panics > 0, "they are counted");
    drop(theirs);
}

#[test]
fn a_logger_that_panics_harms_no_connection() {
    break_the_logger();
    let mut sim = Sim::new(1, Config::new(), ());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    let addr = sim
        .listen(listen, |_: &mut (), _: portcullis::Peer| Echo)
        .expect("listen");
    let bystander = sim.connect(addr).expect("connect");
    // Each of these is logged: a close, a handler's panic, a kill, an undeliverable frame.
    let clients = [(); 3].map(|()| sim.connect(addr).expect("connect"));
    sim.send(clients[0], b"one\n");
    sim.finish(clients[0]);
    sim.send(clients[1], b"panic\n");
    sim.settle();
    let third = sim.control().connections().last().expect("a client").id;
    assert!(sim.control().kill(third));
    sim.advance(Duration::from_secs(5));
    assert_eq!(sim.received(clients[0]), b"one\n");
    let stats = sim.stats();
    assert_eq!(stats.closed(CloseReason::Panicked), 1);
    assert_eq!(stats.closed(CloseReason::Killed), 1);
    assert!(
        stats.panics > 1,
        "the logger's panics are counted: {stats:?}"
    );
    // Those that stay, and those that come, are served.
    let newcomer = sim.connect(addr).expect("connect");
    for client in [bystander, newcomer] {
        sim.send(client, b"still here\n");
        sim.settle();
        assert_eq!(sim.received(client), b"still here\n");
    }
    sim.control().drain(Duration::from_secs(1));
    sim.advance(Duration::from_secs(5));
    assert!(sim.drain_report().is_some());
    assert_eq!(sim.state(bystander), ClientState::Finished);
}

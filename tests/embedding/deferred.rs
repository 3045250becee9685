//! Commands from handles for a connection that is not open yet reach the connection, also if its peer finishes or a drain
//! begins in the turn in which it opens.

use std::io::Write;
use std::net::{Shutdown, TcpListener};
use std::time::Duration;

use kit::net::{read_to_end, turns_until};
use portcullis::sim::{ClientId, Sim};
use portcullis::{
    AccessRules, CloseReason, Config, ConnId, Connect, Context, Framing, Handle, Handler, Listen,
    Message, Outcome, Peer, ProxyProtocol, Quota, Server,
};

/// The header of a proxy's own connection.
const HEADER: &[u8] = b"PROXY UNKNOWN\r\n";
/// What [`tell`] sends, as packets.
const TOLD: &[u8] = b"\0\x05first\0\x06second";

/// Echoes, and sends on the texts of which it is notified.
struct Member;

impl<A> Handler<A> for Member {
    fn on_frame(&mut self, cx: &mut Context<'_, A>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, A>, message: Message) -> Outcome {
        if let Ok(text) = message.downcast::<&str>() {
            cx.conn.send(*text)?;
        }
        // Without a hold: it must not end the one of the commands.
        cx.conn.release();
        Ok(())
    }
}

/// As [`Member`], but it goes on when the peer has finished.
struct Stays;

impl Handler for Stays {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        Member.on_frame(cx, frame)
    }

    fn on_message(&mut self, cx: &mut Context<'_>, message: Message) -> Outcome {
        Member.on_message(cx, message)
    }

    fn on_finish(&mut self, _: &mut Context<'_>) -> Outcome {
        Ok(())
    }
}

fn tell<A>(handle: &Handle<A>, id: ConnId) {
    handle.notify(id, "first").expect("it waits");
    handle.send(id, "second").expect("it waits");
}

fn behind_proxy() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    })
}

/// A client whose header has not come, and the commands for its connection: deferred, or (`queued`) not reached by the
/// loop.
fn told<H: Handler + 'static>(
    config: Config,
    queued: bool,
    make: impl Fn() -> H + 'static,
) -> (Sim, ClientId) {
    let mut sim = Sim::new(1, config, ());
    let addr = sim.listen(behind_proxy(), move |_: &mut (), _| make());
    let client = sim.connect(addr.expect("a listener")).expect("room");
    sim.settle();
    let id = sim.control().connections()[0].id;
    tell(&sim.handle(), id);
    if !queued {
        sim.settle();
    }
    (sim, client)
}

#[track_caller]
fn assert_ended<A>(sim: &Sim<A>, reason: CloseReason) {
    let stats = sim.stats();
    assert_eq!((stats.closed(reason), stats.undeliverable), (1, 0));
}

#[test]
fn a_client_that_finishes_at_once_gets_them() {
    for queued in [false, true] {
        let (mut sim, client) = told(Config::new(), queued, || Member);
        sim.send(client, &[HEADER, b"\0\x02hi"].concat());
        sim.finish(client);
        sim.settle();
        let expected = [b"\0\x02hi", TOLD].concat();
        assert_eq!(sim.received(client), expected, "queued: {queued}");
        assert_ended(&sim, CloseReason::Finished);
    }
}

/// Each of many is carried out in an iteration of its own.
#[test]
fn the_budget_may_be_spent_between_them() {
    for queued in [false, true] {
        let config = Config::new().with(|config| config.budgets.commands = 1);
        let (mut sim, client) = told(config, queued, || Member);
        sim.send(client, HEADER);
        sim.finish(client);
        sim.settle();
        assert_eq!(sim.received(client), TOLD, "queued: {queued}");
        assert_ended(&sim, CloseReason::Finished);
    }
}

#[test]
fn a_handler_that_goes_on_gets_them_too() {
    for queued in [false, true] {
        let (mut sim, client) = told(Config::new(), queued, || Stays);
        sim.send(client, HEADER);
        sim.finish(client);
        sim.settle();
        assert_eq!(sim.received(client), TOLD, "queued: {queued}");
        assert_eq!((sim.stats().open, sim.stats().undeliverable), (1, 0));
        // The hold has ended with them: the idle timeout, and nothing before, ends the connection.
        sim.advance(Duration::from_secs(3600));
        assert_eq!(sim.stats().open, 0);
    }
}

#[test]
fn a_client_that_opens_in_a_drain_gets_them() {
    let (mut sim, client) = told(Config::new(), false, || Member);
    sim.handle().drain(Duration::from_secs(10)).expect("alive");
    sim.settle();
    sim.send(client, HEADER);
    sim.settle();
    assert_eq!(sim.received(client), TOLD);
    sim.finish(client);
    sim.settle();
    assert_ended(&sim, CloseReason::Drained);
}

/// The application's state: the server's own handle.
#[derive(Default)]
struct Own(Option<Handle<Own>>);

/// The service gives them to the handle, and the client has finished before it is accepted.
#[test]
fn a_client_that_finished_in_the_backlog_gets_them() {
    let mut sim = Sim::new(1, Config::new(), Own::default());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2);
    let addr = sim.listen(listen, |own: &mut Own, peer: Peer| {
        let id = peer.id.expect("it is not refused");
        tell(own.0.as_ref().expect("given"), id);
        Member
    });
    let handle = sim.handle();
    sim.app_mut().0 = Some(handle);
    let client = sim.connect(addr.expect("a listener")).expect("room");
    sim.send(client, b"\0\x02hi");
    sim.finish(client);
    sim.settle();
    assert_eq!(sim.received(client), [b"\0\x02hi", TOLD].concat());
    assert_ended(&sim, CloseReason::Finished);
}

/// The backend has finished before the loop sees that it is connected: over a socket, as the simulator tells the loop of
/// a connection at once.
#[test]
fn a_backend_that_finishes_at_once_gets_them() {
    let backend = TcpListener::bind("127.0.0.1:0").expect("a port");
    let to = backend.local_addr().expect("bound");
    let mut server: Server = Server::new(Config::new()).expect("server");
    let connect = Connect::new(Framing::Packet2);
    let id = server.control().connect(to, connect, Member);
    tell(&server.handle(), id.expect("begun"));
    let (mut peer, _) = backend.accept().expect("it comes");
    peer.write_all(b"\0\x02hi").expect("sent");
    peer.shutdown(Shutdown::Write).expect("FIN");
    turns_until(&mut server, &mut (), |server, _| {
        server.control().stats().open == 0
    });
    let expected = [b"\0\x02hi", TOLD].concat();
    assert_eq!(read_to_end(&mut peer), expected);
    let stats = server.control().stats();
    let counts = (stats.closed(CloseReason::Finished), stats.undeliverable);
    assert_eq!(counts, (1, 0));
}

/// An evicted connection never opens, and one that ends in the turn in which it opens takes nothing.
#[test]
fn those_of_a_connection_that_ends_are_counted() {
    let config = Config::new().with(|config| {
        config.pending_limits.connections = Quota::Count(1);
        config.pending_limits.grace = Duration::ZERO;
    });
    let (mut sim, _client) = told(config, false, || Member);
    let addr = sim.control().listeners()[0].addr.clone();
    let addr = addr.as_tcp().expect("an address");
    sim.connect(addr).expect("room");
    sim.settle();
    let stats = sim.stats();
    let counts = (stats.closed(CloseReason::Evicted), stats.undeliverable);
    assert_eq!(counts, (1, 2));

    let (mut sim, client) = told(Config::new(), false, || Member);
    sim.send(client, HEADER);
    sim.reset(client);
    sim.settle();
    assert_eq!((sim.stats().open, sim.stats().undeliverable), (0, 2));
}

/// Over TLS, where the handshake stands between: the client finishes with its last flight, or opens in a drain.
#[cfg(feature = "tls")]
mod tls {
    use kit::sim_tls;

    use super::*;

    fn exchange(mut tls: sim_tls::Client, queued: bool, drains: bool) {
        let mut sim = Sim::new(1, Config::new(), ());
        let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).tls(sim_tls::server_config());
        let addr = sim.listen(listen, |_: &mut (), _| Member);
        let client = sim.connect(addr.expect("a listener")).expect("room");
        sim.settle();
        let id = sim.control().connections()[0].id;
        if !queued {
            tell(&sim.handle(), id);
        }
        sim.send(client, &tls.encrypt(b""));
        sim.settle();
        if drains {
            sim.handle().drain(Duration::from_secs(10)).expect("alive");
            sim.settle();
        }
        let mut plain = Vec::new();
        let flight = sim.received(client);
        let mut flight = tls.decrypt(&flight, &mut plain).expect("a handshake");
        if queued {
            tell(&sim.handle(), id);
        }
        if !drains {
            flight.extend(tls.close_notify());
        }
        sim.send(client, &flight);
        sim.settle();
        let rest = sim.received(client);
        let _ = tls.decrypt(&rest, &mut plain).expect("records");
        assert_eq!(plain, TOLD);
        assert_eq!(sim.stats().undeliverable, 0);
    }

    #[test]
    fn a_client_that_finishes_with_its_handshake_gets_them() {
        for queued in [false, true] {
            exchange(sim_tls::Client::new(), queued, false);
        }
    }

    /// Its close_notify ends both directions, but for what was accepted before.
    #[test]
    fn a_client_of_an_older_version_gets_them() {
        for queued in [false, true] {
            exchange(sim_tls::Client::tls12(), queued, false);
        }
    }

    #[test]
    fn a_client_whose_handshake_ends_in_a_drain_gets_them() {
        for queued in [false, true] {
            exchange(sim_tls::Client::new(), queued, true);
        }
    }
}

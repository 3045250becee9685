//! Operations of a job on a connection that is not open yet harm no connection.

use std::time::Duration;

use portcullis::sim::{ClientId, Sim};
use portcullis::{
    AccessRules, Conn, Context, Error, Framing, Handler, Listen, Outcome, ProxyProtocol,
};

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// Says something else, and its destructor panics.
struct Impostor;

impl Handler for Impostor {
    fn on_frame(&mut self, cx: &mut Context<'_>, _: &[u8]) -> Outcome {
        cx.conn.send("impostor")?;
        Ok(())
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        kit::planned::blow();
    }
}

/// A connection in the middle of its PROXY header, of which `ask` asks something.
fn asked(ask: impl Fn(&mut Conn<'_>)) -> (Sim, ClientId) {
    let mut sim = Sim::new(1, Default::default(), ());
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    });
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, b"PROXY UNK");
    sim.settle();
    let ids: Vec<_> = sim
        .control()
        .connections()
        .iter()
        .map(|info| info.id)
        .collect();
    for id in ids {
        ask(&mut sim.control().conn(id).expect("it is there"));
    }
    sim.settle();
    sim.send(client, b"NOWN\r\n");
    // Nothing stands behind the header: the server waits for the frame.
    sim.advance(Duration::from_secs(1));
    sim.send(client, b"\0\x02hi");
    sim.settle();
    (sim, client)
}

#[test]
fn another_framing_is_for_what_comes() {
    let (mut sim, client) = asked(|conn| conn.set_framing(&Framing::Raw));
    assert_eq!(sim.received(client), b"\0\x02hi");
}

#[test]
fn its_options_are_the_listeners() {
    let (mut sim, client) = asked(|conn| {
        let changed = conn.reconfigure(|conn| conn.max_frame = Some(1));
        assert!(matches!(changed, Err(Error::ConnState(_))));
    });
    assert_eq!(sim.received(client), b"\0\x02hi");
}

#[test]
fn the_handler_is_the_services() {
    let (mut sim, client) = asked(|conn| conn.replace_handler(Impostor));
    assert_eq!(sim.received(client), b"\0\x02hi");
    assert_eq!(sim.stats().panics, 1, "the other one's destructor, at once");
}

#[test]
fn the_rest_waits_or_does_nothing() {
    let asks: [fn(&mut Conn<'_>); 5] = [
        |conn| conn.pause(),
        |conn| conn.resume(),
        |conn| conn.close_after_input(),
        |conn| conn.set_timer(0, Duration::ZERO),
        |conn| assert!(conn.send("early").is_err()),
    ];
    for ask in asks {
        let (mut sim, client) = asked(ask);
        assert_eq!(sim.received(client), b"\0\x02hi");
    }
}

//! Reserved slots: a listener's clients come in while the server is full for all others.

use std::net::SocketAddr;

use portcullis::sim::{ClientId, ClientState, Sim};
use portcullis::{
    AccessRules, AtCapacity, CloseReason, Closed, Config, Connect, Context, Error, Framing,
    Handler, Listen, ListenerState, Outcome,
};

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

fn listen(sim: &mut Sim, name: &str, reserved: usize) -> SocketAddr {
    let listen = Listen::tcp("127.0.0.1:0", Framing::Packet2).name(name);
    let listen = listen.with(|listen| listen.reserved = reserved);
    sim.listen(listen, |_: &mut (), _| Echo).expect("listen")
}

/// A server with a port for everyone and one for its operator.
fn world(cap: usize, reserved: usize) -> (Sim, SocketAddr, SocketAddr) {
    let mut sim = Sim::new(1, Config::max_connections(cap), ());
    let public = listen(&mut sim, "public", 0);
    let operator = listen(&mut sim, "operator", reserved);
    (sim, public, operator)
}

/// Connects and sends a frame.
fn connect(sim: &mut Sim, addr: SocketAddr) -> ClientId {
    let client = sim.connect(addr).expect("it listens");
    sim.send(client, b"\0\x02hi");
    sim.settle();
    client
}

fn is_served(sim: &mut Sim, client: ClientId) -> bool {
    !sim.received(client).is_empty()
}

fn leave(sim: &mut Sim, client: ClientId) {
    sim.finish(client);
    sim.settle();
    assert_eq!(sim.state(client), ClientState::Finished);
}

fn served<const N: usize>(sim: &mut Sim, addr: SocketAddr) -> [ClientId; N] {
    [(); N].map(|()| {
        let client = connect(sim, addr);
        assert!(is_served(sim, client));
        client
    })
}

#[test]
fn other_clients_leave_them_free() {
    let (mut sim, public, operator) = world(4, 2);
    let [one, _] = served(&mut sim, public);
    let waiting = connect(&mut sim, public);
    assert!(!is_served(&mut sim, waiting));
    let full = sim.control().listener("public").expect("it is open").state;
    assert_eq!(full, ListenerState::Full);
    let open = sim.control().listener("operator").expect("it is open");
    assert_eq!(open.state, ListenerState::Listening);

    let [first, _] = served(&mut sim, operator);
    let third = connect(&mut sim, operator);
    assert!(!is_served(&mut sim, third), "all slots are taken");
    // Of two that wait, the one for which the slot is kept comes in.
    leave(&mut sim, first);
    assert!(!is_served(&mut sim, waiting));
    assert!(is_served(&mut sim, third));
    leave(&mut sim, one);
    assert!(is_served(&mut sim, waiting));
    assert_eq!(sim.stats().peak, 4);
}

#[test]
fn the_listener_has_slots_beyond_them_too() {
    let (mut sim, public, operator) = world(5, 1);
    let [first, ..] = served::<3>(&mut sim, operator);
    let _inside = served::<2>(&mut sim, public);
    // It has more than its share already: nothing is kept.
    leave(&mut sim, first);
    let [_last] = served(&mut sim, public);
    assert_eq!(sim.stats().open, 5);
}

#[test]
fn taken_slots_are_reserved_when_they_become_free() {
    let mut sim = Sim::new(1, Config::max_connections(2), ());
    let public = listen(&mut sim, "public", 0);
    let [one, _] = served(&mut sim, public);
    let waiting = connect(&mut sim, public);
    let operator = listen(&mut sim, "operator", 1);
    let report = connect(&mut sim, operator);
    assert!(!is_served(&mut sim, report), "no slot is free");
    leave(&mut sim, one);
    assert!(is_served(&mut sim, report));
    assert!(!is_served(&mut sim, waiting));
}

#[test]
fn a_client_is_refused_rather_than_given_one() {
    let (mut sim, _, operator) = world(3, 2);
    let refuses = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.at_capacity = AtCapacity::Refuse {
            farewell: b"full".to_vec(),
        };
    });
    let refusing = sim.listen(refuses, |_: &mut (), _| Echo).expect("listen");
    let _inside = served::<1>(&mut sim, refusing);
    let refused = connect(&mut sim, refusing);
    assert_eq!(sim.received(refused), b"full");
    assert_eq!(sim.stats().closed(CloseReason::AtCapacity), 1);
    let _reports = served::<2>(&mut sim, operator);
}

#[test]
fn their_number_can_be_changed() {
    let (mut sim, public, _) = world(3, 2);
    let _inside = served::<1>(&mut sim, public);
    let [waiting, other] = [(); 2].map(|()| connect(&mut sim, public));
    let set = |sim: &mut Sim, reserved| {
        let changed = sim
            .control()
            .reconfigure_listener("operator", |listen| listen.reserved = reserved);
        sim.settle();
        changed
    };
    set(&mut sim, 1).expect("a change");
    assert!(is_served(&mut sim, waiting) && !is_served(&mut sim, other));
    // Without effect until a slot is free.
    set(&mut sim, 2).expect("a change");
    leave(&mut sim, waiting);
    assert!(!is_served(&mut sim, other));
    sim.control()
        .close_listener("operator")
        .expect("it is open");
    sim.settle();
    assert!(is_served(&mut sim, other));
}

/// Each client that is turned away leaves the slot to the listener that it came to.
#[test]
fn denied_clients_give_none_to_others() {
    let mut sim = Sim::new(1, Config::max_connections(10), ());
    let refuses = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.at_capacity = AtCapacity::Refuse {
            farewell: b"full".to_vec(),
        };
    });
    let refusing = sim.listen(refuses, |_: &mut (), _| Echo).expect("listen");
    let waiting = listen(&mut sim, "waiting", 0);
    let local = AccessRules::deny_all()
        .allow("127.0.0.0/8")
        .expect("a network");
    let operator = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.reserved = 4;
        listen.access_rules = local;
    });
    let operator = sim.listen(operator, |_: &mut (), _| Echo).expect("listen");
    let _inside = served::<6>(&mut sim, refusing);
    for _ in 0..5 {
        for _ in 0..4 {
            sim.connect_from(operator, [10, 1, 2, 3].into())
                .expect("it listens");
            sim.connect(refusing).expect("it listens");
            sim.connect(waiting).expect("it listens");
        }
        sim.settle();
    }
    assert_eq!(sim.stats().open, 6);
    assert_eq!(sim.stats().closed(CloseReason::Denied), 20);
    let reports = [(); 4].map(|()| {
        let client = sim.connect_from(operator, [127, 0, 0, 1].into());
        let client = client.expect("it listens");
        sim.send(client, b"\0\x02hi");
        client
    });
    sim.settle();
    assert!(reports.iter().all(|&client| is_served(&mut sim, client)));
}

/// Connects elsewhere in its last callback.
struct Dials(SocketAddr);

impl Handler for Dials {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_>, _: &Closed) {
        let connect = Connect::new(Framing::Raw);
        let dialed = cx.conn.control().connect(self.0, connect, Echo);
        assert!(
            matches!(dialed, Err(Error::AtCapacity { .. })),
            "{dialed:?}"
        );
    }
}

#[test]
fn an_outgoing_connection_takes_none() {
    let mut sim = Sim::new(1, Config::max_connections(5), ());
    let public = listen(&mut sim, "public", 0);
    let operator = Listen::tcp("127.0.0.1:0", Framing::Packet2);
    let operator = operator.with(|listen| listen.reserved = 2);
    let operator = sim.listen(operator, move |_: &mut (), _| Dials(public));
    let operator = operator.expect("listen");
    let reports = served::<2>(&mut sim, operator);
    let _inside = served::<3>(&mut sim, public);
    for report in reports {
        sim.finish(report);
    }
    sim.settle();
    assert_eq!((sim.stats().open, sim.stats().outgoing), (3, 0));
    let _reports = served::<2>(&mut sim, operator);
}

/// More than the listener may have are reserved for nobody.
#[test]
fn a_listener_reserves_no_more_than_its_own_limit() {
    let mut sim = Sim::new(1, Config::max_connections(10), ());
    let public = listen(&mut sim, "public", 0);
    let operator = Listen::tcp("127.0.0.1:0", Framing::Packet2).with(|listen| {
        listen.reserved = 8;
        listen.max_connections = Some(2);
    });
    let operator = sim.listen(operator, |_: &mut (), _| Echo).expect("listen");
    let _inside = served::<8>(&mut sim, public);
    let _reports = served::<2>(&mut sim, operator);
}

//! A connection is registered for writing too once a write was not taken whole. The system may
//! refuse that.

use std::net::SocketAddr;
use std::time::Duration;

use kit::net::{local, packet2, Echo};
use portcullis::sim::{Call, ClientId, Faults, Sim};
use portcullis::{CloseReason, Config};

const REFUSALS: [i32; 2] = [libc::ENOMEM, libc::ENOSPC];

/// A server, a client whose answers find little room, and another client.
fn world() -> (Sim, [ClientId; 2]) {
    let listen = local().with(|listen| {
        listen.conn.write_timeout = Duration::from_secs(5);
    });
    let mut sim = Sim::new(1, Config::new(), ());
    let addr: SocketAddr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let clients = [(); 2].map(|()| sim.connect(addr).expect("room in the backlog"));
    sim.settle();
    sim.set_send_buffer(clients[0], 100);
    (sim, clients)
}

fn ping(sim: &mut Sim, client: ClientId) {
    let wire = packet2(b"ping");
    sim.send(client, &wire);
    sim.settle();
    assert_eq!(sim.received(client), wire);
}

/// Each refusal costs a timer's wait. No other connection notices.
#[test]
fn a_registration_for_writing_that_is_refused_is_tried_again() {
    for errno in REFUSALS {
        let (mut sim, [narrow, other]) = world();
        let mut faults = Faults::none();
        for _ in 0..3 {
            faults = faults.with(Call::Reregister, 0, errno);
        }
        sim.set_faults(faults);
        let wire = packet2(&[b'x'; 64]).repeat(10);
        sim.set_reading(narrow, false);
        sim.send(narrow, &wire);
        sim.settle();
        assert_eq!(sim.calls(Call::Reregister), 1);
        ping(&mut sim, other);
        sim.advance(Duration::from_secs(1));
        assert_eq!(
            sim.calls(Call::Reregister),
            4,
            "three refusals, and no more"
        );
        sim.set_reading(narrow, true);
        sim.settle();
        assert_eq!(sim.received(narrow), wire);
        ping(&mut sim, narrow);
        assert_eq!(sim.stats().open, 2);
    }
}

/// Without room announced: a client that reads gets everything, and one that does not is ended by
/// the write timeout, as with it.
#[test]
fn a_registration_for_writing_that_is_always_refused_ends_no_client_that_reads() {
    for errno in REFUSALS {
        let (mut sim, [narrow, other]) = world();
        let mut faults = Faults::none();
        (faults.errors, faults.only) = (1000, Some((Call::Reregister, errno)));
        sim.set_faults(faults);
        let wire = packet2(&[b'x'; 64]).repeat(10);
        for _ in 0..3 {
            sim.set_reading(narrow, false);
            sim.send(narrow, &wire);
            sim.settle();
            ping(&mut sim, other);
            sim.set_reading(narrow, true);
            sim.advance(Duration::from_secs(1));
            assert_eq!(sim.received(narrow), wire);
        }
        // It rests again: the poll sleeps.
        let polls = sim.calls(Call::Poll);
        sim.advance(Duration::from_secs(1));
        assert!(sim.calls(Call::Poll) <= polls + 2, "a timer goes on");

        sim.set_reading(narrow, false);
        sim.send(narrow, &wire);
        let polls = sim.calls(Call::Poll);
        sim.advance(Duration::from_secs(10));
        assert!(sim.calls(Call::Poll) <= polls + 1_100, "two for each try");
        let stats = sim.stats();
        assert_eq!(
            (stats.open, stats.closed(CloseReason::WriteTimeout)),
            (1, 1)
        );
        ping(&mut sim, other);
    }
}

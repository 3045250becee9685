//! What the server asks of the kernel: one read and one write for each readiness, one registration for a connection's life
//! and another once it was full, one poll for as many events as there are. Counted by the simulated kernel: exact, and the
//! same on every machine.

use std::net::SocketAddr;

use kit::net::{local, packet2, Echo};
use portcullis::sim::{Call, ClientId, ClientState, Sim};
use portcullis::Config;

const CLIENTS: u64 = 64;
const ROUNDS: u64 = 100;

fn serve() -> (Sim, SocketAddr) {
    let mut sim = Sim::new(1, Config::new(), ());
    let addr = sim.listen(local(), |_: &mut (), _| Echo).expect("a port");
    sim.settle();
    (sim, addr)
}

fn count(sim: &Sim) -> [u64; Call::ALL.len()] {
    let mut counts = [0; Call::ALL.len()];
    for (count, &call) in counts.iter_mut().zip(Call::ALL) {
        *count = sim.calls(call);
    }
    counts
}

/// How often each call was made meanwhile.
fn calls(sim: &mut Sim, what: impl FnOnce(&mut Sim)) -> Box<dyn Fn(Call) -> u64> {
    let before = count(sim);
    what(sim);
    let after = count(sim);
    Box::new(move |call| {
        let at = Call::ALL
            .iter()
            .position(|&known| known == call)
            .expect("one of all");
        after[at] - before[at]
    })
}

fn come(sim: &mut Sim, addr: SocketAddr) -> Vec<ClientId> {
    let clients = (0..CLIENTS)
        .map(|_| sim.connect(addr).expect("room in the backlog"))
        .collect();
    sim.settle();
    clients
}

/// Every client sends `window` messages at once, and reads them back.
fn rounds(sim: &mut Sim, clients: &[ClientId], window: usize) {
    let wire = packet2(&[b'x'; 64]).repeat(window);
    for _ in 0..ROUNDS {
        for &client in clients {
            sim.send(client, &wire);
        }
        sim.settle();
        for &client in clients {
            assert_eq!(sim.received(client), wire);
        }
    }
}

#[test]
fn a_message_is_one_read_and_one_write() {
    let (mut sim, addr) = serve();
    let clients = come(&mut sim, addr);
    let made = calls(&mut sim, |sim| rounds(sim, &clients, 1));
    assert_eq!(
        (made(Call::Read), made(Call::Write)),
        (CLIENTS * ROUNDS, CLIENTS * ROUNDS)
    );
    // One for the events, one or two that find that there are no more.
    assert!(made(Call::Poll) <= 3 * ROUNDS, "{} polls", made(Call::Poll));
    assert_eq!((made(Call::Register), made(Call::Accept)), (0, 0));
}

#[test]
fn messages_that_come_together_are_answered_together() {
    let (mut sim, addr) = serve();
    let clients = come(&mut sim, addr);
    let made = calls(&mut sim, |sim| rounds(sim, &clients, 16));
    assert_eq!(
        (made(Call::Read), made(Call::Write)),
        (CLIENTS * ROUNDS, CLIENTS * ROUNDS)
    );
    assert!(made(Call::Poll) <= 3 * ROUNDS, "{} polls", made(Call::Poll));
}

/// Four reads of 64 KiB, if nothing else is to be done: then others have their turns.
#[test]
fn a_turn_reads_up_to_256_kib() {
    const READ: usize = 64 * 1024;
    let (mut sim, addr) = serve();
    let clients = come(&mut sim, addr);
    let wire = packet2(&[b'x'; READ - 2 - 1024]);
    for &client in &clients[..2] {
        sim.send(client, &wire.repeat(8));
    }
    let made = calls(&mut sim, |sim| {
        sim.step();
    });
    assert_eq!(made(Call::Read), 8, "four of each");
    sim.settle();
    assert_eq!(sim.received(clients[0]), wire.repeat(8));
}

#[test]
fn a_connection_is_accepted_once_and_registered_once() {
    let (mut sim, addr) = serve();
    let mut clients = Vec::new();
    let made = calls(&mut sim, |sim| clients = come(sim, addr));
    assert_eq!(made(Call::Register), CLIENTS);
    // The last accept of each round finds an empty backlog.
    let rounds = CLIENTS / 16 + 1;
    assert!(
        made(Call::Accept) <= CLIENTS + rounds,
        "{} accepts",
        made(Call::Accept)
    );
    assert_eq!((made(Call::Read), made(Call::Write)), (0, 0));
    assert_eq!(
        (made(Call::RegisterListener), made(Call::DeregisterListener)),
        (0, 0)
    );

    // Until its end: a read that finds it, our own FIN at the most, and no deregistration but the close itself.
    let made = calls(&mut sim, |sim| {
        for &client in &clients {
            sim.finish(client);
        }
        sim.settle();
    });
    assert!(clients
        .iter()
        .all(|&client| sim.state(client) == ClientState::Finished));
    assert_eq!(
        (made(Call::Read), made(Call::Write), made(Call::Shutdown)),
        (CLIENTS, 0, 0)
    );
}

#[test]
fn room_for_output_is_no_event_while_there_is_always_some() {
    let (mut sim, addr) = serve();
    let before = sim.events();
    let clients = come(&mut sim, addr);
    assert_eq!(sim.events() - before, 1, "the listener's");
    let before = sim.events();
    let made = calls(&mut sim, |sim| {
        rounds(sim, &clients, 1);
        for &client in &clients {
            sim.finish(client);
        }
        sim.settle();
    });
    assert_eq!(sim.events() - before, CLIENTS * ROUNDS + CLIENTS);
    assert_eq!((made(Call::Register), made(Call::Reregister)), (0, 0));
}

/// However often it is full: the registration is changed once, and never back.
#[test]
fn a_connection_that_was_full_is_registered_for_writing_too() {
    const TIMES: usize = 10;
    let (mut sim, addr) = serve();
    let clients = come(&mut sim, addr);
    let narrow = clients[0];
    sim.set_send_buffer(narrow, 100);
    let wire = packet2(&[b'x'; 64]).repeat(10);
    let made = calls(&mut sim, |sim| {
        for _ in 0..TIMES {
            sim.set_reading(narrow, false);
            sim.send(narrow, &wire);
            sim.settle();
            sim.set_reading(narrow, true);
            sim.settle();
            assert_eq!(sim.received(narrow), wire);
        }
    });
    assert_eq!((made(Call::Register), made(Call::Reregister)), (0, 1));
    // The others are as they were.
    let made = calls(&mut sim, |sim| rounds(sim, &clients[1..], 1));
    assert_eq!(made(Call::Reregister), 0);
}

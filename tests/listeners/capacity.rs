//! The cap is exact: for all listeners together, in every state, in both directions.

use kit::net::{
    await_end, connect, current_stats, eventually, local, ping, read_to_end, recv2, send2, spawn,
    spawn_echo, Echo,
};
use portcullis::{AtCapacity, CloseReason, Config, ListenerState, Server};

/// At the maximum further clients wait in the backlog; as one leaves, the next is served.
#[test]
fn fifty_more_than_the_cap_are_served_in_turn() {
    const CAP: usize = 20;
    let server = spawn_echo(Config::max_connections(CAP), local());
    let mut inside: Vec<_> = (0..CAP).map(|_| connect(server.addr())).collect();
    for client in &mut inside {
        ping(client, b"inside");
    }
    let mut waiting: Vec<_> = (0..50).map(|_| connect(server.addr())).collect();
    for client in &mut waiting {
        send2(client, b"waiting");
    }
    let stats = server.ask(|(), control| control.stats());
    assert_eq!((stats.open, stats.accepted), (CAP, CAP as u64));
    assert_eq!(
        server.ask(|(), control| control.listeners()[0].state),
        ListenerState::Full
    );
    for mut client in waiting {
        drop(inside.remove(0));
        // Accepted in the order in which they came.
        assert_eq!(recv2(&mut client), b"waiting");
        inside.push(client);
    }
    let (stats, ()) = server.finish();
    assert_eq!((stats.peak, stats.accepted), (CAP, CAP as u64 + 50));
}

#[test]
fn the_cap_holds_over_all_listeners() {
    let server = spawn(|| {
        let mut server = Server::new(Config::max_connections(3)).expect("server");
        server
            .listen(local(), |_: &mut (), _| Echo)
            .expect("listen");
        server
            .listen(local(), |_: &mut (), _| Echo)
            .expect("listen");
        (server, ())
    });
    let [one, other] = [
        kit::net::tcp(&server.listeners[0].addr),
        kit::net::tcp(&server.listeners[1].addr),
    ];
    let mut inside = [connect(one), connect(other), connect(one)];
    for client in &mut inside {
        ping(client, b"in");
    }
    let mut waiting = [connect(one), connect(other)];
    for client in &mut waiting {
        send2(client, b"later");
    }
    assert_eq!(server.ask(|(), control| control.stats().open), 3);
    drop(inside);
    for client in &mut waiting {
        assert_eq!(recv2(client), b"later");
    }
    assert_eq!(server.finish().0.peak, 3);
}

#[test]
fn a_listener_can_have_less() {
    let server = spawn(|| {
        let mut server = Server::new(Config::max_connections(10)).expect("server");
        let small = local()
            .name("small")
            .with(|listen| listen.max_connections = Some(1));
        server.listen(small, |_: &mut (), _| Echo).expect("listen");
        server
            .listen(local().name("large"), |_: &mut (), _| Echo)
            .expect("listen");
        (server, ())
    });
    let (small, large) = (
        kit::net::tcp(&server.listeners[0].addr),
        kit::net::tcp(&server.listeners[1].addr),
    );
    let mut first = connect(small);
    ping(&mut first, b"first");
    let mut second = connect(small);
    send2(&mut second, b"second");
    let mut others: Vec<_> = (0..5).map(|_| connect(large)).collect();
    for client in &mut others {
        ping(client, b"large");
    }
    let small = server.ask(|(), control| control.listener("small").expect("there"));
    assert_eq!(
        (small.connections, small.max_connections, small.state),
        (1, 1, ListenerState::Full)
    );
    drop(first);
    assert_eq!(recv2(&mut second), b"second");
}

#[test]
fn refuse_says_goodbye_and_counts() {
    let farewell = AtCapacity::Refuse {
        farewell: b"full\n".to_vec(),
    };
    let server = spawn_echo(
        Config::max_connections(1),
        local().with(|listen| listen.at_capacity = farewell),
    );
    let mut inside = connect(server.addr());
    ping(&mut inside, b"in");
    for _ in 0..5 {
        assert_eq!(read_to_end(&mut connect(server.addr())), b"full\n");
    }
    ping(&mut inside, b"still in");
    let stats = server.until("five are counted", |stats| {
        stats.closed(CloseReason::AtCapacity) == 5
    });
    assert_eq!(
        (stats.accepted, stats.open, stats.peak, stats.opened),
        (6, 1, 1, 1)
    );
}

#[test]
fn the_cap_changes_live_in_both_directions() {
    let server = spawn_echo(Config::max_connections(2), local());
    let mut inside = [connect(server.addr()), connect(server.addr())];
    for client in &mut inside {
        ping(client, b"in");
    }
    let mut third = connect(server.addr());
    send2(&mut third, b"third");
    server
        .ask(|(), control| control.reconfigure(|config| config.max_connections = 3))
        .expect("raised");
    assert_eq!(recv2(&mut third), b"third");
    // Lowered below the open connections: they stay, and no new one is admitted.
    server
        .ask(|(), control| control.reconfigure(|config| config.max_connections = 1))
        .expect("lowered");
    let mut fourth = connect(server.addr());
    send2(&mut fourth, b"fourth");
    for client in inside.iter_mut().chain([&mut third]) {
        ping(client, b"stays");
    }
    assert_eq!(server.ask(|(), control| control.stats().open), 3);
    drop(inside);
    server.until("two have gone", |stats| stats.open == 1);
    ping(&mut third, b"alone");
    assert_eq!(current_stats(&server.handle).accepted, 3);
    drop(third);
    assert_eq!(recv2(&mut fourth), b"fourth");
}

/// A cap of 0 admits no client. UBF's `proc_socket_server` admits one.
#[test]
fn zero_admits_no_client() {
    let waiting = spawn_echo(Config::max_connections(0), local());
    let mut client = connect(waiting.addr());
    send2(&mut client, b"hello");
    assert_eq!(waiting.ask(|(), control| control.stats().accepted), 0);
    waiting
        .ask(|(), control| control.reconfigure(|config| config.max_connections = 1))
        .expect("raised");
    assert_eq!(recv2(&mut client), b"hello");

    let refusing = spawn_echo(
        Config::max_connections(0),
        local().with(|listen| {
            listen.at_capacity = AtCapacity::Refuse {
                farewell: Vec::new(),
            }
        }),
    );
    await_end(&mut connect(refusing.addr()));
    refusing.until("it is counted", |stats| {
        stats.closed(CloseReason::AtCapacity) == 1
    });
}

#[test]
fn more_than_an_id_can_name_is_an_error_and_changes_nothing() {
    let server = spawn_echo(Config::max_connections(2), local());
    let error = server.ask(|(), control| {
        control
            .reconfigure(|config| config.max_connections = usize::MAX)
            .map_err(|error| error.to_string())
    });
    assert!(error.expect_err("too many").contains("max_connections"));
    assert_eq!(server.ask(|(), control| control.stats().max_connections), 2);
    eventually("it is published", || {
        server.handle.stats().max_connections == 2
    });
}

/// What is reserved for so many is an address space, and no memory before it is used.
#[test]
fn the_largest_cap_serves_the_first_client() {
    let server = spawn_echo(Config::max_connections(16_000_000), local());
    ping(&mut connect(server.addr()), b"hello");
    server.finish();
}

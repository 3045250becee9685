//! A listener can be asked for by id, port or name; "not there" is not "no answer in time", and a late answer is never
//! taken for the answer to another question.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kit::net::{
    connect, hold, local, ping, recv2, send2, spawn, spawn_echo, Echo, Running, PATIENCE,
};
use portcullis::{
    AtCapacity, Config, Error, Framing, HandleError, ListenerRef, ListenerState, Server,
};

/// Long enough to be a wait, short enough for a test: nothing depends on its length.
const SHORT: Duration = Duration::from_millis(20);

fn two_listeners() -> Running {
    spawn(|| {
        let mut server = Server::new(Config::max_connections(10)).expect("server");
        server
            .listen(
                local()
                    .name("games")
                    .with(|listen| listen.max_connections = Some(3)),
                |_: &mut (), _| Echo,
            )
            .expect("listen");
        server
            .listen(local(), |_: &mut (), _| Echo)
            .expect("listen");
        (server, ())
    })
}

/// Without a name of its own a listener is called by its address.
#[test]
fn by_id_by_port_and_by_name_it_is_the_same_one() {
    let server = two_listeners();
    for known in &server.listeners {
        let found = [
            server.handle.listener(known.id, PATIENCE),
            server
                .handle
                .listener(kit::net::tcp(&known.addr).port(), PATIENCE),
            server.handle.listener(known.name.as_str(), PATIENCE),
            server.handle.listener(known.name.clone(), PATIENCE),
        ];
        for info in found {
            assert_eq!(info.as_ref(), Ok(known));
        }
    }
    let unnamed = &server.listeners[1];
    assert_eq!(unnamed.name, unnamed.addr.to_string());
}

/// UBF's `proc_socket_server` answers `{Num, Max}`.
#[test]
fn a_listener_tells_how_many_it_has_and_may_have() {
    let server = two_listeners();
    let counts = |which: &str| {
        let info = server.handle.listener(which, PATIENCE).expect("there");
        (info.connections, info.max_connections, info.accepted)
    };
    let other = server.listeners[1].name.clone();
    // Without a limit of its own, the server's.
    assert_eq!((counts("games"), counts(&other)), ((0, 3, 0), (0, 10, 0)));
    let mut clients = [connect(server.addr()), connect(server.addr())];
    for client in &mut clients {
        ping(client, b"in");
    }
    assert_eq!((counts("games"), counts(&other)), ((2, 3, 2), (0, 10, 0)));
    drop(clients);
    server.until("they have gone", |stats| stats.open == 0);
    assert_eq!(counts("games"), (0, 3, 2));
    // The server's cap, when it is the smaller one.
    server
        .ask(|(), control| control.reconfigure(|config| config.max_connections = 2))
        .expect("lowered");
    assert_eq!((counts("games").1, counts(&other).1), (2, 2));
}

/// An unknown listener and a late answer are different errors.
#[test]
fn not_there_is_not_no_answer_in_time() {
    let server = two_listeners();
    let nobody = "nobody";
    let missing = Err(HandleError::NoListener(ListenerRef::from(nobody)));
    assert_eq!(server.handle.listener(nobody, PATIENCE), missing);
    let held = hold(&server.handle);
    // The same query and the same listener, without an answer.
    assert_eq!(
        server.handle.listener(nobody, SHORT),
        Err(HandleError::Timeout)
    );
    assert_eq!(
        server.handle.listener("games", SHORT),
        Err(HandleError::Timeout)
    );
    drop(held);
    assert_eq!(server.handle.listener(nobody, PATIENCE), missing);
    assert!(server.handle.listener("games", PATIENCE).is_ok());
    let texts = [
        missing.map_err(|error| error.to_string()),
        Err(HandleError::Timeout.to_string()),
    ];
    assert_ne!(texts[0], texts[1]);
    let (port, id) = (
        ListenerRef::from(1),
        ListenerRef::from(server.listeners[1].id),
    );
    assert_eq!(
        server.handle.listener(port.clone(), PATIENCE),
        Err(HandleError::NoListener(port))
    );
    assert!(server.handle.listener(id, PATIENCE).is_ok());
}

/// In UBF's `proc_socket_server` the reply to a timed-out question answers the next one.
#[test]
fn a_late_answer_is_never_the_next_ones() {
    let server = spawn_echo(Config::new(), local());
    for round in 0..20_u32 {
        let held = hold(&server.handle);
        for late in 0..3 {
            let answer = server.handle.call(SHORT / 20, move |(), _| (round, late));
            assert_eq!(answer, Err(HandleError::Timeout));
        }
        drop(held);
        // The three are answered before this one is, without a receiver.
        assert_eq!(
            server.handle.call(PATIENCE, move |(), _| (round, 9)),
            Ok((round, 9))
        );
    }
}

#[test]
fn nor_when_the_next_question_waits_already() {
    let server = spawn_echo(Config::new(), local());
    let held = hold(&server.handle);
    assert_eq!(
        server.handle.call(SHORT, |(), _| "late"),
        Err(HandleError::Timeout)
    );
    let (asked, asking) = mpsc::channel();
    let askers: Vec<_> = (0..4_u32)
        .map(|number| {
            let (handle, asked) = (server.handle.clone(), asked.clone());
            thread::spawn(move || {
                asked.send(()).expect("the test waits");
                handle.call(PATIENCE, move |(), _| number)
            })
        })
        .collect();
    for _ in &askers {
        asking.recv_timeout(PATIENCE).expect("it asks");
    }
    drop(held);
    for (number, asker) in (0..).zip(askers) {
        assert_eq!(asker.join().expect("no panic"), Ok(number));
    }
}

#[test]
fn a_question_waits_no_longer_than_it_says_and_the_longest_is_for_ever() {
    let server = spawn_echo(Config::new(), local());
    let held = hold(&server.handle);
    let begun = Instant::now();
    assert_eq!(
        server.handle.call(Duration::ZERO, |(), _| ()),
        Err(HandleError::Timeout)
    );
    assert_eq!(
        server.handle.listener(server.addr().port(), SHORT),
        Err(HandleError::Timeout)
    );
    assert!(begun.elapsed() < PATIENCE);
    drop(held);
    assert_eq!(server.handle.call(Duration::MAX, |(), _| 1), Ok(1));
}

/// UBF's `proc_socket_server` says `ok` to everything.
#[test]
fn closing_a_listener_twice_or_an_unknown_one_is_an_error() {
    let server = two_listeners();
    let mut client = connect(server.addr());
    ping(&mut client, b"in");
    let close = |which: ListenerRef| {
        server.ask(move |(), control| match control.close_listener(which) {
            Err(Error::NoListener { listener }) => Err(listener),
            other => {
                other.expect("closed");
                Ok(())
            }
        })
    };
    let (id, port) = (server.listeners[0].id, server.addr().port());
    let [by_id, by_port, by_name] = [
        ListenerRef::from(id),
        ListenerRef::from(port),
        ListenerRef::from("games"),
    ];
    assert_eq!(close(by_name.clone()), Ok(()));
    // Its connection lives on, so it is remembered; but it is a listener no more.
    for which in [by_name, by_port, by_id] {
        assert_eq!(close(which.clone()), Err(which.clone()));
        assert_eq!(
            server.handle.listener(which.clone(), PATIENCE),
            Err(HandleError::NoListener(which.clone()))
        );
        let errors = server.ask(move |(), control| {
            [
                control.suspend(which.clone()),
                control.resume(which.clone()),
            ]
            .map(|done| done.is_err())
        });
        assert_eq!(errors, [true, true]);
    }
    assert_eq!(
        close(ListenerRef::from("nobody")),
        Err(ListenerRef::from("nobody"))
    );
    assert_eq!(
        server.ask(|(), control| control.listeners()),
        server.listeners[1..]
    );
    ping(&mut client, b"lives on");
}

/// A name and a port are free as soon as their listener is closed, though its connections live.
#[test]
fn a_closed_listeners_name_can_be_taken_again() {
    let mut server = Server::new(Config::new()).expect("server");
    let first = server
        .listen(local().name("games"), |_: &mut (), _| Echo)
        .expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let mut client = connect(addr);
    send2(&mut client, b"in");
    let begun = Instant::now();
    while server.control().stats().traffic.frames_out == 0 {
        assert!(begun.elapsed() < PATIENCE);
        server.poll_once(&mut (), Some(SHORT)).expect("a turn");
    }
    server.control().close_listener("games").expect("closed");
    let second = server
        .listen(
            portcullis::Listen::tcp(addr, Framing::Packet2).name("games"),
            |_: &mut (), _| Echo,
        )
        .expect("the name and the port are free");
    assert_ne!(first, second);
    let found = server.control().listener("games").expect("there");
    assert_eq!((found.id, found.connections), (second, 0));
    assert!(matches!(
        server.control().listener(first),
        Err(Error::NoListener { .. })
    ));
    assert_eq!(
        server.control().listener(addr.port()).expect("there").id,
        second
    );
    // The first one's connection is still its own.
    assert_eq!(server.control().connections()[0].listener, Some(first));
    assert_eq!(recv2(&mut client), b"in");
}

#[test]
fn the_state_tells_why_a_listener_takes_no_client() {
    let server = two_listeners();
    let state = |which: &str| {
        server
            .handle
            .listener(which, PATIENCE)
            .expect("there")
            .state
    };
    assert_eq!(state("games"), ListenerState::Listening);
    let mut clients: Vec<_> = (0..3).map(|_| connect(server.addr())).collect();
    for client in &mut clients {
        ping(client, b"in");
    }
    assert_eq!(state("games"), ListenerState::Full);
    // Suspended by request: it is reported first. A second call changes nothing.
    for _ in 0..2 {
        server
            .ask(|(), control| control.suspend("games"))
            .expect("suspended");
        assert_eq!(state("games"), ListenerState::Suspended);
    }
    clients.clear();
    server.until("they have gone", |stats| stats.open == 0);
    assert_eq!(state("games"), ListenerState::Suspended);
    let mut waiting = connect(server.addr());
    send2(&mut waiting, b"waits");
    assert_eq!(server.ask(|(), control| control.stats().open), 0);
    for _ in 0..2 {
        server
            .ask(|(), control| control.resume("games"))
            .expect("resumed");
        assert_eq!(state("games"), ListenerState::Listening);
    }
    assert_eq!(recv2(&mut waiting), b"waits");
}

/// One that refuses at the cap stays in the poll to say so.
#[test]
fn a_listener_that_refuses_is_never_full() {
    let server = spawn_echo(
        Config::max_connections(1),
        local().name("polite").with(|listen| {
            listen.at_capacity = AtCapacity::Refuse {
                farewell: Vec::new(),
            }
        }),
    );
    ping(&mut connect(server.addr()), b"in");
    let info = server.handle.listener("polite", PATIENCE).expect("there");
    assert_eq!(info.state, ListenerState::Listening);
}

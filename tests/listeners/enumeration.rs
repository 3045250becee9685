//! Connections can be listed as they are and ended by id; an id never reaches its slot's next tenant.

use std::io::Write;
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kit::net::{
    await_end, connect, eventually, hold, local, ping, recv2, spawn, spawn_echo, Echo, Running,
    PATIENCE,
};
use portcullis::{
    try_accept, CloseReason, Config, ConnId, ConnInfo, Context, Framing, HandleError, Handler,
    Listen, Message, Outcome, Peer, Refuse, Server, State,
};

fn connections<A: Send + 'static>(server: &Running<A>) -> Vec<ConnInfo> {
    server.ask(|_, control| control.connections())
}

/// The connection of a client.
#[track_caller]
fn info<A: Send + 'static>(server: &Running<A>, client: &TcpStream) -> ConnInfo {
    let addr = client.local_addr().expect("addr");
    let found = connections(server)
        .into_iter()
        .find(|info| info.peer == addr);
    found.expect("it is listed")
}

/// Each entry names the peer and the listener.
#[test]
fn every_connection_is_listed_with_peer_and_listener() {
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(local(), |_: &mut (), _| Echo)
            .expect("listen");
        server
            .listen(local(), |_: &mut (), _| Echo)
            .expect("listen");
        (server, ())
    });
    assert!(connections(&server).is_empty());
    let mut clients: Vec<_> = (0..6)
        .map(|n| connect(kit::net::tcp(&server.listeners[n % 2].addr)))
        .collect();
    for client in &mut clients {
        ping(client, b"in");
    }
    let all = connections(&server);
    assert_eq!(all.len(), 6);
    for (n, client) in clients.iter().enumerate() {
        let own = info(&server, client);
        assert_eq!(
            (own.listener, own.state),
            (Some(server.listeners[n % 2].id), State::Open)
        );
        assert!(server.handle.is_live(own.id));
        assert_eq!(
            all.iter().filter(|other| other.id == own.id).count(),
            1,
            "one id each"
        );
    }
    clients.truncate(2);
    server.until("four have gone", |stats| stats.open == 2);
    assert_eq!(connections(&server).len(), 2);
}

#[test]
fn what_it_carried_and_how_long_it_has_been_silent() {
    let server = spawn_echo(Config::new(), local());
    let begun = Instant::now();
    let mut client = connect(server.addr());
    ping(&mut client, b"hello");
    ping(&mut client, b"");
    // Half a frame: its bytes count, and they are held.
    client.write_all(&[0, 9, 1, 2, 3]).expect("send");
    eventually("it has come", || {
        info(&server, &client).traffic.bytes_in == 14
    });
    let own = info(&server, &client);
    assert_eq!((own.traffic.frames_in, own.traffic.frames_out), (2, 2));
    assert_eq!((own.traffic.bytes_out, own.queued, own.buffered), (9, 0, 5));
    let before = (own.age, own.idle);
    eventually("time passes", || info(&server, &client).idle > before.1);
    let own = info(&server, &client);
    assert!(own.age > before.0 && own.age <= begun.elapsed() && own.idle <= own.age);
    client.write_all(&[4, 5, 6, 7, 8, 9]).expect("send");
    assert_eq!(recv2(&mut client), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let fresh = info(&server, &client);
    assert!(fresh.idle < fresh.age && fresh.age >= own.age && fresh.buffered == 0);
    // One line for a log names all of it.
    let line = fresh.to_string();
    for part in [
        fresh.id.to_string(),
        fresh.peer.to_string(),
        "Open".to_owned(),
    ] {
        assert!(line.contains(&part), "{line}");
    }
}

#[test]
fn what_waits_for_a_peer_that_does_not_read_is_told() {
    let listen = local().with(|listen| {
        listen.framing = Framing::Packet4;
        listen.socket.send_buffer = Some(8 * 1024);
        listen.conn.low_watermark = 1;
        listen.conn.high_watermark = 1000;
        listen.conn.output_limit = 1 << 20;
    });
    let server = spawn_echo(Config::new(), listen);
    let mut client = connect(server.addr());
    server.until("it is accepted", |stats| stats.opened == 1);
    let wire = [&[0, 1, 0, 0][..], &[7; 64 * 1024]].concat();
    client.set_nonblocking(true).expect("nonblocking");
    let (mut sent, mut own) = (0, info(&server, &client));
    eventually("output waits", || {
        // The server reads until the kernel takes no more of its answers.
        sent += client.write(&wire[sent % wire.len()..]).unwrap_or(0);
        own = info(&server, &client);
        own.queued > 1000
    });
    assert!(
        own.queued <= (1 << 20) + wire.len() && own.buffered >= own.queued,
        "{own:?}"
    );
}

#[test]
fn one_that_is_closing_is_listed_as_such() {
    struct OneAnswer;
    impl Handler for OneAnswer {
        fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
            cx.conn.send(frame)?;
            cx.conn.close();
            Ok(())
        }
    }
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        let listen = local().with(|listen| {
            listen.conn.linger_timeout = Duration::MAX;
            listen.conn.linger_bytes = usize::MAX;
        });
        server
            .listen(listen, |_: &mut (), _| OneAnswer)
            .expect("listen");
        (server, ())
    });
    let mut client = connect(server.addr());
    ping(&mut client, b"bye");
    // Our FIN is sent, the peer's has not come.
    let own = info(&server, &client);
    assert_eq!(own.state, State::Closing);
    assert_eq!(server.ask(|(), control| control.stats().open), 1);
    // It accepts no more frames, and a sender gets an error.
    server
        .handle
        .send(own.id, "late")
        .expect("it is still live");
    server.until("it did not take the frame", |stats| {
        stats.undeliverable == 1
    });
    // And it can be ended. The reason stays the first one: all that was promised has been sent.
    server.handle.kill(own.id).expect("killed");
    let stats = server.until("it is gone", |stats| stats.open == 0);
    assert_eq!(stats.closed(CloseReason::Closed), 1);
    assert!(connections(&server).is_empty());
}

#[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
#[test]
fn one_in_its_handshake_is_listed_as_such_and_can_be_killed() {
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        let site = kit::tls::Site::new();
        let listen = local().tls(Arc::new(site.server()));
        server.listen(listen, |_: &mut (), _| Echo).expect("listen");
        (server, ())
    });
    let mut client = connect(server.addr());
    server.until("it is accepted", |stats| stats.open == 1);
    let own = info(&server, &client);
    assert_eq!((own.state, own.traffic.frames_in), (State::Handshaking, 0));
    // A frame and a message wait until it opens.
    server.handle.send(own.id, "early").expect("it is live");
    server.handle.notify(own.id, 1_u32).expect("it is live");
    let own = info(&server, &client);
    assert_eq!((own.state, own.queued), (State::Handshaking, 0));
    assert_eq!(server.ask(|(), control| control.stats().undeliverable), 0);
    server.handle.kill(own.id).expect("killed");
    await_end(&mut client);
    let stats = server.until("it is gone", |stats| stats.open == 0);
    assert_eq!((stats.closed(CloseReason::Killed), stats.opened), (1, 0));
    assert_eq!(stats.undeliverable, 2, "neither is lost without a trace");
}

/// A kill works from each of the three places that can do it.
#[test]
fn server_control_and_handle_kill_by_id() {
    let server = spawn_echo(Config::new(), local());
    let mut clients = [
        connect(server.addr()),
        connect(server.addr()),
        connect(server.addr()),
    ];
    for client in &mut clients {
        ping(client, b"in");
    }
    let [by_control, by_handle, stays] = &mut clients;
    let (first, second) = (info(&server, by_control).id, info(&server, by_handle).id);
    assert!(server.ask(move |(), control| control.kill(first)));
    server.handle.kill(second).expect("killed");
    await_end(by_control);
    await_end(by_handle);
    ping(stays, b"stays");
    server.until("both are counted", |stats| {
        stats.closed(CloseReason::Killed) == 2
    });
    assert!(
        !server.ask(move |(), control| control.kill(first)),
        "it has gone"
    );

    let mut own = Server::new(Config::new()).expect("server");
    own.listen(local(), |_: &mut (), _| Echo).expect("listen");
    let mut client = connect(kit::net::tcp(&own.control().listeners()[0].addr));
    own.poll_once(&mut (), Some(PATIENCE)).expect("a turn");
    let id = own.control().connections()[0].id;
    assert!(own.control().kill(id));
    own.poll_once(&mut (), Some(PATIENCE)).expect("a turn");
    await_end(&mut client);
    assert!(!own.control().kill(id) && own.control().connections().is_empty());
}

/// Notes its id, and every message.
struct Tenant;

impl Handler<Vec<ConnId>> for Tenant {
    fn on_open(&mut self, cx: &mut Context<'_, Vec<ConnId>>) -> Outcome {
        cx.app.push(cx.conn.id());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Vec<ConnId>>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }

    fn on_message(&mut self, _: &mut Context<'_, Vec<ConnId>>, _: Message) -> Outcome {
        panic!("a message for somebody else");
    }
}

fn one_slot(listen: Listen) -> Running<Vec<ConnId>> {
    spawn(|| {
        let mut server = Server::new(Config::max_connections(1)).expect("server");
        server
            .listen(listen, |_: &mut Vec<ConnId>, _| Tenant)
            .expect("listen");
        (server, Vec::new())
    })
}

/// With one slot, each client is the next tenant of the one before.
#[test]
fn an_old_id_does_nothing_to_the_next_tenant() {
    let server = one_slot(local());
    let mut ids = Vec::new();
    for round in 0..5 {
        let mut client = connect(server.addr());
        ping(&mut client, b"in");
        let id = server.ask(|ids, _| *ids.last().expect("opened"));
        for &old in &ids {
            assert_ne!(old, id);
            assert!(!server.handle.is_live(old));
            let gone = Err(HandleError::NoConnection(old));
            assert_eq!(server.handle.send(old, "for another"), gone);
            assert_eq!(server.handle.notify(old, 1_u32), gone);
            assert_eq!(server.handle.kill(old), gone);
            let found =
                server.ask(move |_, control| (control.kill(old), control.conn(old).is_some()));
            assert_eq!(found, (false, false));
        }
        ping(&mut client, b"undisturbed");
        ids.push(id);
        drop(client);
        server.until("it has gone", |stats| stats.closed_total() == round + 1);
    }
    assert_eq!(server.handle.stats().closed(CloseReason::Finished), 5);
}

/// The command is in the queue when its connection goes and another takes the slot: it is checked again on the loop.
#[test]
fn nor_does_a_command_that_waited_meanwhile() {
    // Each turn carries out one command, then accepts.
    let server = spawn(|| {
        let config = Config::max_connections(1).with(|config| config.budgets.commands = 1);
        let mut server = Server::new(config).expect("server");
        server
            .listen(local(), |_: &mut Vec<ConnId>, _| Tenant)
            .expect("listen");
        (server, Vec::new())
    });
    let mut first = connect(server.addr());
    ping(&mut first, b"in");
    let old = server.ask(|ids, _| ids[0]);
    let mut second = connect(server.addr());
    second.write_all(&kit::net::packet2(b"next")).expect("send");
    let held = hold(&server.handle);
    server.handle.kill(old).expect("live");
    for _ in 0..10 {
        server.handle.send(old, "late").expect("live");
        server.handle.notify(old, 1_u32).expect("live");
        server.handle.kill(old).expect("live");
    }
    drop(held);
    assert_eq!(recv2(&mut second), b"next", "nothing came before its echo");
    ping(&mut second, b"undisturbed");
    let stats = server.until("all came too late", |stats| stats.undeliverable == 30);
    assert_eq!((stats.closed(CloseReason::Killed), stats.open), (1, 1));
}

/// A service may pass an id on before it refuses: no other connection gets that id.
#[test]
fn a_refused_peers_id_is_not_given_again() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let server = spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        let mut refuse = true;
        let service = try_accept(move |(): &mut (), peer: Peer| {
            noted
                .lock()
                .expect("lock")
                .push(peer.id.expect("below the cap"));
            refuse = !refuse;
            if refuse {
                Ok(Echo)
            } else {
                Err(Refuse::silently())
            }
        });
        server.listen_with(local(), service).expect("listen");
        (server, ())
    });
    await_end(&mut connect(server.addr()));
    let mut served = connect(server.addr());
    ping(&mut served, b"in");
    let ids = seen.lock().expect("lock").clone();
    assert_eq!(ids[1], info(&server, &served).id);
    assert_ne!(ids[0], ids[1]);
    assert!(!server.handle.is_live(ids[0]));
    assert_eq!(
        server.handle.kill(ids[0]),
        Err(HandleError::NoConnection(ids[0]))
    );
    ping(&mut served, b"undisturbed");
}

//! Chaos as ranch makes it (its suite `stampede`): whatever is killed, panics, closes and changes at random under load, the
//! port answers at the end.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kit::net::{connect, eventually, local, ping, spawn, Echo, ReadSome, Running, PATIENCE};
use portcullis::{AtCapacity, Config, Context, Framing, Handler, Listen, Outcome, Server};

/// Echoes, and panics when asked to.
struct Fragile;

impl Handler for Fragile {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        assert_ne!(frame, b"die", "as planned (this panic belongs to the test)");
        Handler::<()>::on_frame(&mut Echo, cx, frame)
    }
}

fn server(config: Config, listen: Listen) -> Running {
    spawn(move || {
        let mut server = Server::new(config).expect("server");
        server
            .listen(listen, |_: &mut (), _| Fragile)
            .expect("listen");
        (server, ())
    })
}

/// A sequence that looks random and is the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        // Knuth's MMIX generator.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }
}

/// Talks, breaks off, resets, panics its handler, and comes again, until it is over.
fn client(addr: SocketAddr, seed: u64, over: &AtomicBool) {
    let mut dice = Dice(seed);
    while !over.load(Ordering::Relaxed) {
        let Ok(mut stream) = TcpStream::connect(addr) else {
            continue;
        };
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        for _ in 0..dice.roll(20) {
            let frame: &[u8] = match dice.roll(10) {
                0 => b"\0\x03die",
                1 => b"\0\x09half",
                _ => b"\0\x05hello",
            };
            // Killed at any moment: every error is as it should be.
            let sent = stream.write_all(frame).is_ok();
            if !sent || frame.len() == 6 || stream.read_some(&mut [0; 16]).unwrap_or(0) == 0 {
                break;
            }
        }
    }
}

/// ranch: stampede_tcp, stampede_embedded. Connections die of everything, and options change meanwhile.
#[test]
fn the_port_answers_after_a_stampede() {
    let server = server(Config::max_connections(60), local().name("it"));
    let addr = server.addr();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for seed in 0..8 {
            let over = &over;
            scope.spawn(move || client(addr, seed, over));
        }
        let mut dice = Dice(99);
        for _ in 0..2000 {
            let (what, number) = (dice.roll(9), dice.roll(50));
            let done = server.handle.call(PATIENCE, move |_, control| {
                let ids: Vec<_> = control.connections().iter().map(|info| info.id).collect();
                let victim = ids.get(number % ids.len().max(1)).copied();
                match what {
                    0..=3 => drop(victim.map(|id| control.kill(id))),
                    4 => drop(victim.and_then(|id| control.conn(id).map(|mut conn| conn.close()))),
                    5 => control.suspend("it").expect("there"),
                    6 => control.resume("it").expect("there"),
                    7 => control
                        .reconfigure(|config| config.max_connections = number)
                        .expect("good"),
                    _ => control
                        .reconfigure_listener("it", |listen| match number % 3 {
                            0 => {
                                listen.at_capacity = AtCapacity::Refuse {
                                    farewell: Vec::new(),
                                }
                            }
                            1 => listen.at_capacity = AtCapacity::Wait,
                            _ => listen.max_connections = Some(number + 1),
                        })
                        .expect("good"),
                }
            });
            done.expect("the loop answers");
        }
        over.store(true, Ordering::Relaxed);
        // A client in a backlog would wait for ever.
        server
            .handle
            .call(PATIENCE, |_, control| {
                control.resume("it").expect("there");
                control
                    .reconfigure(|config| config.max_connections = 60)
                    .expect("good");
                let free = |listen: &mut Listen| {
                    listen.max_connections = Some(60);
                    listen.at_capacity = AtCapacity::Wait;
                };
                control.reconfigure_listener("it", free).expect("good");
            })
            .expect("the loop answers");
    });
    ping(&mut connect(addr), b"still here");
    server.until("nobody is left", |stats| stats.open == 0);
    let stats = server.handle.stats();
    assert_eq!(stats.accepted, stats.closed_total());
}

/// ranch: tcp_set_max_connections_clean. A hundred changes from many threads leave no listener stuck.
#[test]
fn a_hundred_changes_of_the_cap_leave_it_working() {
    let server = server(Config::max_connections(1), local());
    let addr = server.addr();
    thread::scope(|scope| {
        for thread in 0..10_u64 {
            let handle = server.handle.clone();
            scope.spawn(move || {
                let mut dice = Dice(thread);
                for _ in 0..10 {
                    let cap = dice.roll(20);
                    handle
                        .change(PATIENCE, move |control| {
                            control.reconfigure(|config| config.max_connections = cap)
                        })
                        .expect("good");
                }
            });
        }
    });
    let mut waiting: Vec<_> = (0..20).map(|_| connect(addr)).collect();
    server
        .handle
        .change(PATIENCE, |control| {
            control.reconfigure(|config| config.max_connections = 20)
        })
        .expect("good");
    for client in &mut waiting {
        ping(client, b"in");
    }
}

/// ranch: misc_repeated_start_stop. esockd: t_reopen, which kills the connections: ours live on.
#[test]
fn a_port_is_closed_and_opened_a_hundred_times() {
    let mut server = Server::new(Config::new()).expect("server");
    let service = |_: &mut (), _| Fragile;
    server
        .listen(local().name("first"), service)
        .expect("listen");
    let addr = server
        .control()
        .listener("first")
        .expect("there")
        .addr
        .as_tcp()
        .expect("TCP");
    let mut clients = Vec::new();
    for round in 0..100 {
        if round % 10 == 0 {
            clients.push(connect(addr));
        }
        server
            .poll_once(&mut (), Some(std::time::Duration::ZERO))
            .expect("a turn");
        server.control().close_listener("first").expect("there");
        server
            .listen(Listen::tcp(addr, Framing::Packet2).name("first"), service)
            .expect("the port is free again");
    }
    let handle = server.handle();
    let told = thread::spawn(move || {
        for client in &mut clients {
            ping(client, b"alive");
        }
        drop(clients);
        ping(&mut connect(addr), b"and open");
        eventually("all have gone", || handle.stats().open == 0);
        handle.stop().expect("it runs");
    });
    server.run(&mut ()).expect("run");
    told.join().expect("the clients");
}

/// ranch: stampede_ssl.
#[cfg(feature = "tls")]
#[test]
fn the_port_answers_after_a_stampede_of_handshakes() {
    use kit::tls::{exchange, secure, session, wire_of, Site};
    use portcullis::tls::rustls::version;

    let site = Site::new();
    let config = std::sync::Arc::new(site.server());
    let server = server(Config::max_connections(40), local().tls(config));
    let addr = server.addr();
    let client = site.client(&version::TLS13);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for seed in 0..4 {
            let (over, client) = (&over, &client);
            scope.spawn(move || {
                let mut dice = Dice(seed);
                while !over.load(Ordering::Relaxed) {
                    let hello = wire_of(&mut session(client));
                    if let Ok(mut stream) = TcpStream::connect(addr) {
                        // A part of the hello, garbage behind it now and then, and gone.
                        let part = dice.roll(hello.len() + 1);
                        let _ = stream.write_all(&hello[..part]);
                        if dice.roll(3) == 0 {
                            let _ = stream.write_all(b"garbage behind it");
                        }
                    }
                }
            });
        }
        let mut dice = Dice(7);
        for _ in 0..300 {
            let number = dice.roll(40);
            let killed = server.handle.call(PATIENCE, move |_, control| {
                let ids: Vec<_> = control.connections().iter().map(|info| info.id).collect();
                ids.get(number % ids.len().max(1))
                    .map(|&id| control.kill(id))
            });
            killed.expect("the loop answers");
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(exchange(secure(addr, &client), b"\0\x02hi"), b"\0\x02hi");
    server.until("nobody is left", |stats| stats.open == 0);
}

//! Several servers on several threads act as one: one port, one handle, and nothing runs until all are there.

#[allow(dead_code)] // its part
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, Arc};
use std::time::Duration;

use kit::exposition::Exposition;
use kit::net::{
    await_end, connect, current_stats, eventually, held_by_each, local, ping, recv2, send2, tcp,
    Place, PATIENCE,
};
use portcullis::{
    Close, CloseReason, Config, Context, Error, Framing, Handle, HandleError, Handler, Listen,
    ListenerState, Outcome, Result, Server, Shards, Spawned,
};

/// Answers each frame with the number of its shard.
struct Who;

impl Handler<usize> for Who {
    fn on_frame(&mut self, cx: &mut Context<'_, usize>, _frame: &[u8]) -> Outcome {
        let number = [u8::try_from(*cx.app).expect("few shards")];
        cx.conn.send(number)?;
        Ok(())
    }
}

fn who(_app: &mut usize, _peer: portcullis::Peer) -> Who {
    Who
}

fn shards(count: usize, listen: Listen) -> Spawned<usize> {
    let build = move |shard, server: &mut Server<usize>| {
        server.listen(listen.clone(), who)?;
        Ok(shard)
    };
    Shards::new(Config::new())
        .threads(count)
        .spawn(build)
        .expect("shards")
}

fn addr(shards: &Spawned<usize>) -> SocketAddr {
    tcp(&shards.listeners[0].addr)
}

fn asked(client: &mut TcpStream) -> usize {
    send2(client, b"who");
    usize::from(recv2(client)[0])
}

fn finish<A>(shards: Spawned<A>) {
    shards
        .handle
        .drain(Duration::from_secs(10))
        .expect("they run");
    eventually("the shards end", || shards.is_finished());
    assert!(shards.join().expect("no error").is_some());
}

/// Clients that stay, until each shard has one.
fn one_for_each(shards: &Spawned<usize>) -> Vec<TcpStream> {
    let count = shards.handle.shards().len();
    let mut clients: Vec<Option<TcpStream>> = (0..count).map(|_| None).collect();
    let mut others = Vec::new();
    for _ in 0..100 * count {
        let mut client = connect(addr(shards));
        let shard = asked(&mut client);
        match &mut clients[shard] {
            free @ None => *free = Some(client),
            Some(_) => others.push(client),
        }
        if clients.iter().all(Option::is_some) {
            return clients.into_iter().flatten().collect();
        }
    }
    panic!("of {} clients some shard had none", others.len());
}

#[test]
fn all_shards_have_clients_of_one_port() {
    for reuse_port in [false, true] {
        let shards = shards(
            3,
            local().with(|listen| listen.socket.reuse_port = reuse_port),
        );
        assert_eq!(
            (shards.listeners.len(), shards.handle.shards().len()),
            (1, 3)
        );
        assert_ne!(addr(&shards).port(), 0);
        let clients = one_for_each(&shards);
        for (shard, mut client) in clients.into_iter().enumerate() {
            assert_eq!(asked(&mut client), shard, "for good");
        }
        finish(shards);
    }
}

/// A shard with more connections than the others leaves them the next. Not for long: on a busy
/// machine they may be too late for it.
#[test]
fn the_shard_with_fewer_connections_takes_the_next() {
    let mut tries = (0..20).map(|_| {
        let shards = shards(2, local());
        let busy = kit::net::hold(&shards.handle.shards().nth(1).expect("a shard"));
        let mut clients: Vec<_> = (0..100).map(|_| connect(addr(&shards))).collect();
        assert!(clients.iter_mut().all(|client| asked(client) == 0));
        drop(busy);
        shards
            .handle
            .call_each(PATIENCE, |_, _, _| ())
            .expect("answers");
        let mut next = 0;
        for _ in 0..50 {
            let mut client = connect(addr(&shards));
            next += asked(&mut client);
            clients.push(client);
        }
        drop(clients);
        finish(shards);
        next
    });
    // Left to chance it would be half of them.
    assert!(
        tries.any(|next| next >= 42),
        "the first goes on taking them"
    );
}

/// Clients that stay are not all one shard's, however quick it is.
#[test]
fn clients_that_stay_are_spread() {
    let shards = shards(2, local());
    let clients: Vec<_> = (0..200)
        .map(|_| {
            let mut client = connect(addr(&shards));
            asked(&mut client);
            client
        })
        .collect();
    let held = held_by_each(&shards);
    assert!(held.iter().all(|&held| held >= 50), "{held:?}");
    drop(clients);
    finish(shards);
}

#[test]
fn there_is_one_shard_for_each_core() {
    let cores = std::thread::available_parallelism().expect("known").get();
    let shards = Shards::new(Config::new())
        .spawn(|_, _: &mut Server<()>| Ok(()))
        .expect("shards");
    assert_eq!(shards.handle.shards().len(), cores);
    finish(shards);
}

/// Two of the same address are two, and what one shard alone has is its own.
#[test]
fn each_listen_is_one_listener() {
    let build = |shard, server: &mut Server<usize>| {
        server.listen(local().name("one"), who)?;
        server.listen(local().name("two"), who)?;
        if shard == 1 {
            server.listen(local().name("admin"), who)?;
        }
        Ok(shard)
    };
    let shards = Shards::new(Config::new())
        .threads(2)
        .spawn(build)
        .expect("shards");
    let names: Vec<_> = shards
        .listeners
        .iter()
        .map(|listener| listener.name.as_str())
        .collect();
    assert_eq!(names, ["one", "two", "admin"]);
    let mut ports: Vec<_> = shards
        .listeners
        .iter()
        .map(|listener| tcp(&listener.addr).port())
        .collect();
    for _ in 0..10 {
        assert_eq!(asked(&mut connect(tcp(&shards.listeners[2].addr))), 1);
    }
    ports.dedup();
    assert_eq!(ports.len(), 3);
    // Whichever shard has the listener does it.
    shards
        .handle
        .change(PATIENCE, |control| control.suspend("admin"))
        .expect("one has it");
    let error = shards
        .handle
        .change(PATIENCE, |control| control.suspend("nobody"))
        .expect_err("none has it");
    assert_eq!(error, HandleError::NoListener("nobody".into()));
    finish(shards);
}

/// Listeners on ports that the system chooses are matched by name, in whatever order they come.
#[test]
fn a_chosen_port_belongs_to_a_name() {
    let build = |shard, server: &mut Server<usize>| {
        let mut names = ["one", "two", "three"];
        names.rotate_left(shard);
        for name in names.into_iter().take(3 - shard / 2) {
            // The framing tells which listener it is.
            let framing = match name {
                "one" => portcullis::Framing::Packet1,
                "two" => portcullis::Framing::Packet2,
                _ => portcullis::Framing::Packet4,
            };
            server.listen(
                local().name(name).with(|listen| listen.framing = framing),
                who,
            )?;
        }
        Ok(shard)
    };
    let shards = Shards::new(Config::new())
        .threads(3)
        .spawn(build)
        .expect("shards");
    let mut ports = Vec::new();
    for listener in &shards.listeners {
        let header: &[u8] = match listener.name.as_str() {
            "one" => &[3],
            "two" => &[0, 3],
            _ => &[0, 0, 0, 3],
        };
        ports.push(tcp(&listener.addr).port());
        for _ in 0..40 {
            let mut client = connect(tcp(&listener.addr));
            let frame = [header, b"who"].concat();
            std::io::Write::write_all(&mut client, &frame).expect("sent");
            let mut answer = vec![0; header.len() + 1];
            std::io::Read::read_exact(&mut client, &mut answer).expect("the right service");
        }
    }
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 3);
    finish(shards);
}

#[test]
fn a_unix_socket_is_shared_and_removed_by_the_last() {
    let place = Place::new();
    let path = place.path("socket");
    let shards = shards(3, Listen::unix(&path, Framing::Packet2));
    let clients: Vec<_> = (0..30)
        .map(|_| {
            let mut client = UnixStream::connect(&path).expect("connect");
            client.set_read_timeout(Some(PATIENCE)).expect("timeout");
            send2(&mut client, b"who");
            recv2(&mut client);
            client
        })
        .collect();
    assert_eq!(current_stats(&shards.handle).open, 30);
    let name = shards.listeners[0].name.clone();
    for shard in [1, 0] {
        let name = name.clone();
        let close =
            move |_: &mut _, control: &mut portcullis::Control<'_, _>| control.close_listener(name);
        let handle = shards.handle.shards().nth(shard).expect("a shard");
        handle
            .call(PATIENCE, close)
            .expect("answered")
            .expect("open");
        assert!(path.exists(), "another one has it");
        let mut late = UnixStream::connect(&path).expect("connect");
        late.set_read_timeout(Some(PATIENCE)).expect("timeout");
        send2(&mut late, b"who");
        recv2(&mut late);
    }
    drop(clients);
    finish(shards);
    assert!(!path.exists());
}

#[test]
fn one_handle_reaches_all() {
    let shards = shards(2, local().name("door"));
    let handle = shards.handle.clone();
    let mut clients = one_for_each(&shards);

    let doubled = handle.call_each(PATIENCE, |shard, app, _| {
        *app *= 10;
        (shard, *app)
    });
    assert_eq!(doubled.expect("answers"), [(0, (0, 0)), (1, (1, 10))]);
    let (tell, told) = mpsc::channel();
    handle
        .post_each(move |shard, _, _| tell.send(shard).expect("the test waits"))
        .expect("posted");
    let mut heard: Vec<_> = (0..2)
        .map(|_| told.recv_timeout(PATIENCE).expect("each"))
        .collect();
    heard.sort_unstable();
    assert_eq!(heard, [0, 1]);

    // A connection's id names its shard, and is refused in another one.
    let ids = handle.call_each(PATIENCE, |_, _, control| control.connections());
    let (shard, connections) = ids.expect("answers").into_iter().last().expect("two");
    let local_addr = clients[1].local_addr().expect("known");
    let found = connections
        .iter()
        .find(|info| info.peer == local_addr)
        .expect("in shard 1");
    let many = Err(HandleError::ManyShards);
    assert_eq!(handle.post(|_, _| ()), many);
    assert_eq!(handle.call(PATIENCE, |_, _| ()), many);
    let own = handle.shards().nth(shard).expect("a shard");
    for knows in [&own, &handle] {
        assert!(knows.is_live(found.id));
        knows.send(found.id, "news").expect("alive");
        assert_eq!(recv2(&mut clients[1]), b"news");
    }
    let id = found.id;
    let other = handle.shards().next().expect("a shard");
    let gone = Err(HandleError::NoConnection(id));
    assert!(!other.is_live(id));
    assert_eq!(other.send(id, "news"), gone);
    assert_eq!(other.notify(id, 7), gone);
    assert_eq!(other.kill(id), gone);
    let asked = other.call(PATIENCE, move |_, control| {
        (control.kill(id), control.conn(id).is_none())
    });
    assert_eq!(asked, Ok((false, true)));
    assert!(handle.shards().nth(2).is_none());
    handle.kill(id).expect("alive");
    await_end(&mut clients[1]);
    eventually("its slot is free", || !handle.is_live(id));
    assert_eq!(handle.send(id, "news"), Err(HandleError::NoConnection(id)));

    eventually("it is counted", || {
        handle.stats().closed(portcullis::CloseReason::Killed) == 1
    });
    let (stats, each) = (
        handle.stats(),
        handle.shards().map(|handle| handle.stats().accepted),
    );
    assert_eq!((stats.accepted, stats.max_connections), (each.sum(), 1024));
    assert_eq!(stats.accepted, stats.open as u64 + stats.closed_total());

    let metrics = handle.metrics(PATIENCE).expect("answers");
    let read = Exposition::read(&metrics.to_string());
    assert_eq!(
        read.get("portcullis_accepted_total", &[]),
        stats.accepted as f64
    );
    assert_eq!(read.get("portcullis_max_connections", &[]), 1024.0);
    assert_eq!(
        read.get(
            "portcullis_listener_accepted_total",
            &[("listener", "door")]
        ),
        stats.accepted as f64
    );
    let frames = metrics.histograms.frame_size_in.count();
    assert_eq!(
        (frames, metrics.descriptors),
        (metrics.stats.traffic.frames_in, metrics.stats.open + 2)
    );
    finish(shards);
}

/// Ends its connection for a reason that has the number of its shard, or one that all have.
struct Labels;

impl Handler<usize> for Labels {
    fn on_frame(&mut self, cx: &mut Context<'_, usize>, frame: &[u8]) -> Outcome {
        let own = ["shard_0", "shard_1"].get(*cx.app).expect("two shards");
        match frame {
            b"own" => Err(Close::because("asked to").labelled(own)),
            b"common" => Err(Close::because("asked to").labelled("common")),
            _ => Who.on_frame(cx, frame),
        }
    }
}

#[test]
fn the_labels_of_all_shards_are_counted() {
    let listen = local().name("door");
    let build = move |shard, server: &mut Server<usize>| {
        server.listen(listen.clone(), |_: &mut usize, _| Labels)?;
        Ok(shard)
    };
    let spawned = Shards::new(Config::new()).threads(2).spawn(build);
    let shards = spawned.expect("shards");
    for end in ["own", "common", "own"] {
        for mut client in one_for_each(&shards) {
            send2(&mut client, end.as_bytes());
            await_end(&mut client);
        }
    }
    let handle = &shards.handle;
    let failed = CloseReason::Failed;
    eventually("all are counted", || handle.stats().closed(failed) == 6);
    let stats = handle.stats();
    let labels: Vec<_> = stats.closed_labels(failed).collect();
    assert_eq!(labels, [("common", 2), ("shard_0", 2), ("shard_1", 2)]);
    let metrics = handle.metrics(PATIENCE).expect("answers");
    let read = Exposition::read(&metrics.to_string());
    for (label, count) in labels {
        let labels = [("reason", "failed"), ("cause", label)];
        assert_eq!(read.get("portcullis_closed_total", &labels), count as f64);
        let labels = [("listener", "door"), labels[0], labels[1]];
        let name = "portcullis_listener_closed_total";
        assert_eq!(read.get(name, &labels), count as f64);
    }
    assert_eq!(
        read.get("portcullis_closed_total", &[("reason", "failed")]),
        0.0
    );
    finish(shards);
}

#[test]
fn what_is_changed_is_changed_in_all() {
    let shards = shards(2, local().name("door"));
    let handle = shards.handle.clone();
    handle
        .change(PATIENCE, |control| {
            control.reconfigure(|config| {
                config.budgets.accepts = 7;
                config.max_connections = 50;
            })
        })
        .expect("changed");
    assert_eq!(
        (
            handle.stats().max_connections,
            handle.stats().max_connections
        ),
        (50, 50)
    );
    let refused = handle.change(PATIENCE, |control| {
        control.reconfigure(|config| config.budgets.accepts = 0)
    });
    assert!(
        matches!(refused, Err(HandleError::Refused(_))),
        "{refused:?}"
    );
    let refused = handle.set_max_connections(usize::MAX);
    assert!(
        matches!(refused, Err(HandleError::Refused(_))),
        "{refused:?}"
    );
    assert_eq!(handle.stats().max_connections, 50);
    // A change of another option keeps a cap that was set elsewhere.
    handle.set_max_connections(60).expect("changed");
    handle
        .change(PATIENCE, |control| {
            control.reconfigure(|config| config.budgets.accepts = 8)
        })
        .expect("changed");
    assert_eq!(handle.stats().max_connections, 60);
    let set = |_: &mut usize, control: &mut portcullis::Control<'_, usize>| {
        control.reconfigure(|config| config.max_connections = 70)
    };
    let one = handle.shards().nth(1).expect("a shard");
    one.call(PATIENCE, set).expect("answered").expect("changed");
    assert_eq!(handle.stats().max_connections, 70, "it is the cap of all");

    let limit = |listen: &mut Listen| listen.max_connections = Some(3);
    handle
        .change(PATIENCE, move |control| {
            control.reconfigure_listener("door", limit)
        })
        .expect("changed");
    assert_eq!(
        handle.listeners(PATIENCE).expect("answers")[0].max_connections,
        6
    );
    handle
        .change(PATIENCE, |control| control.suspend("door"))
        .expect("suspended");
    assert_eq!(
        handle.listeners(PATIENCE).expect("answers")[0].state,
        ListenerState::Suspended
    );
    let mut waits = connect(addr(&shards));
    send2(&mut waits, b"who");
    handle
        .change(PATIENCE, |control| control.resume("door"))
        .expect("resumed");
    recv2(&mut waits);
    handle
        .change(PATIENCE, |control| control.close_listener("door"))
        .expect("closed");
    assert_eq!(handle.listeners(PATIENCE).expect("answers"), []);
    let refused = TcpStream::connect(addr(&shards)).expect_err("no port");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    finish(shards);
}

#[test]
fn a_shard_that_asks_all_does_not_wait_for_itself() {
    let shards = shards(2, local());
    let (handle, own) = (
        shards.handle.clone(),
        shards.handle.shards().nth(1).expect("a shard"),
    );
    let answer = own.call(PATIENCE, move |_, _| {
        handle.call_each(PATIENCE, |_, _, _| ())
    });
    assert_eq!(answer, Ok(Err(HandleError::OwnThread)));
    finish(shards);
}

#[test]
fn a_job_that_panics_or_is_late_is_told() {
    let shards = shards(2, local());
    let panicked = shards
        .handle
        .call_each(PATIENCE, |shard, _, _| assert_eq!(shard, 0));
    assert_eq!(panicked, Err(HandleError::Panicked));
    eventually("it is counted", || shards.handle.stats().panics == 1);
    let busy = kit::net::hold(&shards.handle.shards().next().expect("a shard"));
    let late = shards
        .handle
        .call_each(Duration::from_millis(1), |_, _, _| ());
    assert_eq!(late, Err(HandleError::Timeout));
    drop(busy);
    finish(shards);
}

#[test]
fn a_job_for_all_runs_where_its_queue_has_room() {
    let config = Config::new().with(|config| config.queue_limits.commands = 1);
    let build = |shard, server: &mut Server<usize>| {
        server.listen(local(), who)?;
        Ok(shard)
    };
    let shards = Shards::new(config).threads(3).spawn(build).expect("shards");
    let two = shards.handle.shards().take(2);
    let busy: Vec<_> = two
        .map(|shard| {
            let busy = kit::net::hold(&shard);
            shard.post(|_, _| ()).expect("room for one");
            busy
        })
        .collect();
    let (tell, told) = mpsc::channel();
    let posted = shards
        .handle
        .post_each(move |shard, _, _| tell.send(shard).expect("the test waits"));
    assert_eq!(posted, Err(HandleError::QueueFull));
    assert_eq!(told.recv_timeout(PATIENCE), Ok(2));
    drop(busy);
    let end = told.recv_timeout(PATIENCE).expect_err("on no other");
    assert_eq!(end, mpsc::RecvTimeoutError::Disconnected);
    finish(shards);
}

#[test]
fn after_the_end_the_handle_says_so() {
    let shards = shards(2, local());
    let handle: Handle<usize> = shards.handle.clone();
    // Those that still run are asked without those that have gone.
    handle
        .shards()
        .next()
        .expect("a shard")
        .stop()
        .expect("it runs");
    eventually("one has gone", || {
        handle
            .call_each(PATIENCE, |_, app, _| *app)
            .is_ok_and(|answers| answers == [(1, 1)])
    });
    handle.post_each(|_, _, _| {}).expect("one runs");
    ping_who(&mut connect(addr(&shards)), 1);
    handle.stop().expect("one runs");
    eventually("the shards end", || shards.is_finished());
    assert_eq!(
        shards.join().expect("no error"),
        None,
        "they were not drained"
    );
    assert_eq!(
        handle.call_each(PATIENCE, |_, _, _| ()),
        Err(HandleError::ServerGone)
    );
    assert_eq!(handle.post_each(|_, _, _| {}), Err(HandleError::ServerGone));
    assert_eq!(handle.drain(PATIENCE), Err(HandleError::ServerGone));
    assert_eq!(handle.stop(), Err(HandleError::ServerGone));
    assert_eq!(handle.set_max_connections(5), Err(HandleError::ServerGone));
    assert_eq!(
        handle.change(PATIENCE, |control| control.suspend(7)),
        Err(HandleError::ServerGone)
    );
    assert!(handle.metrics(PATIENCE).is_err());
    assert_eq!(handle.stats().accepted, 1, "the counters stay");
}

#[track_caller]
fn ping_who(client: &mut TcpStream, shard: usize) {
    assert_eq!(asked(client), shard);
}

/// After a failed build no client was served, every port is free again, every state is dropped.
struct Alive(Arc<AtomicUsize>);

impl Alive {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[test]
fn an_error_in_one_build_ends_the_others() {
    let alive = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&alive);
    let free = TcpListener::bind("127.0.0.1:0")
        .expect("bind")
        .local_addr()
        .expect("known");
    let outcome =
        Shards::new(Config::new())
            .threads(3)
            .spawn(move |shard, server: &mut Server<Alive>| {
                server.listen(Listen::tcp(free, Framing::Packet2), |_: &mut Alive, _| {
                    kit::net::Echo
                })?;
                if shard == 2 {
                    assert_eq!(count.load(Ordering::SeqCst), 2, "the others are there");
                    server.listen(
                        Listen::tcp("no address", Framing::Packet2),
                        |_: &mut Alive, _| kit::net::Echo,
                    )?;
                }
                Ok(Alive::new(&count))
            });
    assert!(matches!(outcome, Err(Error::Address { .. })), "{outcome:?}");
    assert_eq!(alive.load(Ordering::SeqCst), 0);
    TcpListener::bind(free).expect("the port is free");
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = taken.local_addr().expect("known");
    let outcome: Result<Spawned<usize>> =
        Shards::new(Config::new())
            .threads(2)
            .spawn(move |shard, server| {
                server.listen(Listen::tcp(port, Framing::Packet2), who)?;
                Ok(shard)
            });
    assert!(
        matches!(outcome, Err(Error::AddressInUse { .. })),
        "{outcome:?}"
    );
    let config = Config::new().with(|config| config.budgets.accepts = 0);
    let outcome = Shards::new(config).spawn(|_, _: &mut Server<()>| Ok(()));
    assert!(matches!(outcome, Err(Error::Option { .. })), "{outcome:?}");
}

#[test]
fn more_threads_than_make_sense_are_an_error() {
    let outcome = Shards::new(Config::new())
        .threads(usize::MAX)
        .spawn(|_, _: &mut Server<()>| Ok(()));
    assert!(
        matches!(
            outcome,
            Err(Error::Option {
                option: "threads",
                ..
            })
        ),
        "{outcome:?}"
    );
}

#[test]
fn a_panic_in_one_build_ends_the_others_and_goes_on() {
    let alive = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&alive);
    let spawn = AssertUnwindSafe(move || {
        Shards::new(Config::new())
            .threads(3)
            .spawn(move |shard, _: &mut Server<Alive>| {
                assert!(shard < 2, "shard {shard} cannot be made");
                Ok(Alive::new(&count))
            })
    });
    let panic = catch_unwind(spawn).expect_err("the panic comes through");
    let words = panic.downcast_ref::<String>().expect("words");
    assert_eq!(words, "shard 2 cannot be made");
    assert_eq!(alive.load(Ordering::SeqCst), 0);
}

#[test]
fn a_single_shard_is_a_server() {
    let shards = Shards::new(Config::new()).threads(0).spawn(|_, server| {
        server.listen(local(), |_: &mut (), _| kit::net::Echo)?;
        Ok(())
    });
    let shards = shards.expect("shards");
    assert_eq!(shards.handle.shards().len(), 1);
    ping(&mut connect(tcp(&shards.listeners[0].addr)), b"hello");
    finish(shards);
}

/// The listener of the list is that of all shards: reasons and traffic too.
#[test]
fn a_listeners_counts_are_those_of_all_shards() {
    let shards = shards(3, local().name("it"));
    let addr = tcp(&shards.listeners[0].addr);
    let mut clients: Vec<_> = (0..12).map(|_| connect(addr)).collect();
    for client in &mut clients {
        send2(client, b"hello");
        recv2(client);
    }
    drop(clients);
    let handle = &shards.handle;
    eventually("all have ended", || handle.stats().closed_total() == 12);
    let all = handle.listeners(PATIENCE).expect("answers");
    let reasons = kit::reasons(|reason| all[0].closed(reason));
    assert_eq!(reasons, [(portcullis::CloseReason::Finished, 12)]);
    let traffic = all[0].traffic;
    assert_eq!((traffic.frames_in, traffic.frames_out), (12, 12));
    assert_eq!((traffic.bytes_in, traffic.bytes_out), (12 * 7, 12 * 3));
}

//! A slot is taken while a connection has it and no longer, whatever its shard does meanwhile. A
//! free slot is found by a shard that has time, and only by as many as it takes.

use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::thread;
use std::time::Duration;

use kit::net::{
    connect, connect_from, current_stats, eventually, hold, local, ping, recv2, send2, tcp,
    PATIENCE,
};
use portcullis::{
    AccessRules, Alarm, AtCapacity, CloseReason, Closed, Config, Connect, Context, Control,
    Detached, Framing, Handler, Listen, Outcome, Peer, Quota, Refuse, Server, Service, Shards,
    Spawned,
};

/// Stops a shard inside foreign code, once for each message.
#[derive(Clone)]
struct Stops {
    inside: mpsc::Sender<()>,
    release: Arc<Mutex<mpsc::Receiver<()>>>,
}

/// The test's end of [`Stops`].
struct Stopped {
    inside: mpsc::Receiver<()>,
    release: mpsc::Sender<()>,
}

fn stops() -> (Stops, Stopped) {
    let (tell, inside) = mpsc::channel();
    let (release, released) = mpsc::channel();
    let stops = Stops {
        inside: tell,
        release: Arc::new(Mutex::new(released)),
    };
    (stops, Stopped { inside, release })
}

impl Stops {
    fn stop(&self) {
        let _ = self.inside.send(());
        let released = self.release.lock().expect("no panic");
        // Longer than a client waits for its answer.
        let _ = released.recv_timeout(2 * PATIENCE);
    }
}

impl Stopped {
    #[track_caller]
    fn wait(&self) {
        self.inside.recv_timeout(PATIENCE).expect("it stops there");
    }
}

/// Echoes; `stop` stops its shard, `leave` detaches the connection.
#[derive(Clone)]
struct Obeys {
    stops: Stops,
    left: Arc<Mutex<Vec<Detached>>>,
}

impl Handler for Obeys {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        match frame {
            b"stop" => self.stops.stop(),
            b"leave" => {
                let left = Arc::clone(&self.left);
                cx.conn
                    .detach(move |stream| left.lock().expect("no panic").push(stream))?;
                return Ok(());
            }
            _ => {}
        }
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// Stops its shard when it hears of a client that was denied, or when it refuses one.
struct Guarded {
    obeys: Obeys,
    refuses: bool,
}

impl Service<()> for Guarded {
    fn accept(&mut self, (): &mut (), _: Peer) -> Result<Box<dyn Handler>, Refuse> {
        if std::mem::take(&mut self.refuses) {
            return Err(Refuse::silently());
        }
        Ok(Box::new(self.obeys.clone()))
    }

    fn on_failed_accept(&mut self, (): &mut (), _: &Peer, closed: &Closed) {
        if matches!(closed.reason, CloseReason::Denied | CloseReason::Refused) {
            self.obeys.stops.stop();
        }
    }
}

fn spawn(cap: usize, count: usize, listen: Listen) -> (Spawned, SocketAddr, Stopped, Obeys) {
    let (stops, stopped) = stops();
    let left = Arc::default();
    let obeys = Obeys { stops, left };
    let made = obeys.clone();
    let build = move |_, server: &mut Server| {
        let obeys = made.clone();
        server.listen(listen.clone(), move |_: &mut (), _| obeys.clone())?;
        Ok(())
    };
    let shards = Shards::new(Config::max_connections(cap))
        .threads(count)
        .spawn(build)
        .expect("shards");
    let addr = tcp(&shards.listeners[0].addr);
    (shards, addr, stopped, obeys)
}

#[track_caller]
fn finish(shards: Spawned) {
    shards.handle.drain(Duration::ZERO).expect("they run");
    eventually("the shards end", || shards.is_finished());
    shards.join().expect("no error");
}

/// Clients of shard 0, because the other shards are busy meanwhile.
fn in_shard_0(shards: &Spawned, addr: SocketAddr, count: usize) -> Vec<TcpStream> {
    let busy: Vec<_> = shards
        .handle
        .shards()
        .skip(1)
        .map(|shard| hold(&shard))
        .collect();
    let clients = (0..count).map(|_| {
        let mut client = connect(addr);
        ping(&mut client, b"inside");
        client
    });
    let clients = clients.collect();
    drop(busy);
    clients
}

/// A client that waits in the backlog, seen by every shard.
fn waiting(shards: &Spawned, addr: SocketAddr) -> TcpStream {
    let mut client = connect(addr);
    send2(&mut client, b"waiting");
    for shard in shards.handle.shards() {
        let before = shard.stats().iterations;
        shard.wake().expect("it runs");
        eventually("an iteration", || shard.stats().iterations > before);
    }
    client
}

/// A client that is denied or refused never had the slot, though its shard is busy with it.
#[test]
fn a_client_that_gets_no_slot_takes_none() {
    for (denies, policy) in [
        (
            true,
            AtCapacity::Refuse {
                farewell: Vec::new(),
            },
        ),
        (true, AtCapacity::Wait),
        (
            false,
            AtCapacity::Refuse {
                farewell: Vec::new(),
            },
        ),
        (false, AtCapacity::Wait),
    ] {
        let (stops, stopped) = stops();
        let left = Arc::default();
        let obeys = Obeys { stops, left };
        let first = Arc::new(AtomicUsize::new(0));
        let build = move |_, server: &mut Server| {
            let mut rules = AccessRules::allow_all();
            if denies {
                rules = rules.deny("127.0.0.2")?;
            }
            let listen = local().with(|listen| {
                listen.at_capacity = policy.clone();
                listen.access_rules = rules;
            });
            let guarded = Guarded {
                obeys: obeys.clone(),
                // One of the two: the first that accepts is asked to refuse.
                refuses: !denies && first.fetch_add(1, Ordering::Relaxed) == 0,
            };
            server.listen_with(listen, guarded)?;
            Ok(())
        };
        let shards = Shards::new(Config::max_connections(1))
            .threads(2)
            .spawn(build)
            .expect("shards");
        let addr = tcp(&shards.listeners[0].addr);
        let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let to = elsewhere.local_addr().expect("bound");
        let turned_away = if denies {
            connect_from("127.0.0.2:0", addr)
        } else {
            let busy = hold(&shards.handle.shards().nth(1).expect("a shard"));
            let client = connect(addr);
            stopped.wait();
            drop(busy);
            client
        };
        if denies {
            stopped.wait();
        }
        // One shard is stopped in foreign code; the other has the slot.
        let mut client = connect(addr);
        ping(&mut client, b"served");
        drop(client);
        eventually("it has gone", || {
            shards.handle.stats().closed(CloseReason::Finished) == 1
        });
        // The shard that is stopped does not answer.
        let (tell, told) = mpsc::channel();
        let dial = move |_, (): &mut (), control: &mut Control<'_, ()>| {
            let options = Connect::new(Framing::Packet2);
            let _ = tell.send(control.connect(to, options, Idle).is_ok());
        };
        shards.handle.post_each(dial).expect("they run");
        let found = told.recv_timeout(PATIENCE);
        assert_eq!(found, Ok(true), "an outgoing connection finds it too");
        stopped.release.send(()).expect("it waits");
        drop(turned_away);
        let stats = current_stats(&shards.handle);
        assert_eq!(stats.closed(CloseReason::AtCapacity), 0);
        finish(shards);
    }
}

struct Idle;

impl Handler for Idle {
    fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
        Ok(())
    }
}

/// One client after the other: never is there one too many.
#[test]
fn no_client_is_refused_while_none_is_connected() {
    for (count, cap) in [(2, 1), (3, 1), (4, 2)] {
        let listen = local().with(|listen| {
            listen.at_capacity = AtCapacity::Refuse {
                farewell: Vec::new(),
            }
        });
        let (shards, addr, _stopped, _) = spawn(cap, count, listen);
        let free = format!("free: {cap},");
        for _ in 0..300 {
            ping(&mut connect(addr), b"hello");
            eventually("it has gone", || {
                format!("{:?}", shards.handle).contains(&free)
            });
        }
        let stats = current_stats(&shards.handle);
        assert_eq!(stats.closed(CloseReason::AtCapacity), 0);
        finish(shards);
    }
}

/// The end of one client and a frame whose handler blocks, in one batch of events.
#[test]
fn a_freed_slot_is_found_while_its_shard_is_stopped() {
    for detached in [false, true] {
        let (shards, addr, stopped, obeys) = spawn(2, 2, local());
        let mut clients = in_shard_0(&shards, addr, 2);
        let (mut stays, mut goes) = (clients.remove(0), clients.remove(0));
        if detached {
            send2(&mut goes, b"leave");
            eventually("it has left", || {
                !obeys.left.lock().expect("no panic").is_empty()
            });
        }
        let mut waits = waiting(&shards, addr);
        let busy = hold(&shards.handle.shards().next().expect("a shard"));
        if !detached {
            drop(goes);
        }
        send2(&mut stays, b"stop");
        drop(busy);
        stopped.wait();
        // Shard 0 is inside the handler, and the other one has nothing to do.
        if detached {
            obeys.left.lock().expect("no panic").clear();
        }
        assert_eq!(recv2(&mut waits), b"waiting");
        stopped.release.send(()).expect("it waits");
        assert_eq!(recv2(&mut stays), b"stop");
        drop((stays, waits));
        eventually("all slots are free", || {
            format!("{:?}", shards.handle).contains("free: 2,")
        });
        finish(shards);
    }
}

/// A detached connection is one of all shards until its stream is dropped, even if its own shard
/// has ended.
#[test]
fn the_cap_counts_detached_connections_of_an_ended_shard() {
    let (shards, addr, _stopped, obeys) = spawn(2, 2, local());
    let mut inside = in_shard_0(&shards, addr, 2);
    for client in &mut inside {
        send2(client, b"leave");
    }
    let left = || obeys.left.lock().expect("no panic").len();
    eventually("both have left", || left() == 2);
    let going = shards.handle.shards().next().expect("a shard");
    going.stop().expect("it runs");
    eventually("it has ended", || going.stop().is_err());
    let mut waits = connect(addr);
    send2(&mut waits, b"waiting");
    let other = shards.handle.shards().nth(1).expect("a shard");
    for _ in 0..3 {
        let asked = other.call(PATIENCE, |(), control| control.stats().accepted);
        assert_eq!(asked, Ok(0), "there is no slot");
    }
    assert!(format!("{:?}", shards.handle).contains("free: 0,"));
    obeys.left.lock().expect("no panic").pop();
    assert_eq!(recv2(&mut waits), b"waiting");
    obeys.left.lock().expect("no panic").clear();
    drop(waits);
    eventually("all slots are free", || {
        format!("{:?}", shards.handle).contains("free: 2,")
    });
    shards.handle.drain(Duration::ZERO).expect("one runs");
    eventually("the shards end", || shards.is_finished());
    shards.join().expect("no error");
}

/// At the cap, a client costs no more than its own shard's iterations, and now and then another's.
#[test]
fn a_freed_slot_wakes_few_shards() {
    const CLIENTS: u64 = 400;
    for (cap, threads) in [(1, 1), (1, 3), (4, 8)] {
        let (shards, addr, _stopped, _) = spawn(cap, 4, local());
        let before = shards.handle.stats();
        let clients: Vec<_> = (0..threads)
            .map(|_| {
                thread::spawn(move || {
                    for _ in 0..CLIENTS / threads {
                        let mut client = connect(addr);
                        ping(&mut client, b"hello");
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().expect("served");
        }
        let after = shards.handle.stats();
        let iterations = (after.iterations - before.iterations) as f64;
        let each = iterations / (after.accepted - before.accepted) as f64;
        // One each for its accept, its frame and its end, of which the first is often the end of another. Not one more for each
        // of the other shards: that would be five at the least.
        assert!(
            each < 4.5,
            "{each} iterations for a client at the cap {cap}"
        );
        finish(shards);
    }
}

/// An alarm on connections counts those under the cap: of all shards, in each of them, idle or not.
/// One on descriptors counts the listeners of the shards too.
#[test]
fn an_alarm_counts_the_connections_of_all_shards() {
    const CAP: usize = 20;
    const SHARDS: usize = 3;
    for (alarm, listeners) in [
        (Alarm::Connections(Quota::Percent(80)), 0),
        (Alarm::Connections(Quota::Count(16)), 0),
        (Alarm::Descriptors(Quota::Count(16 + SHARDS)), SHARDS),
    ] {
        let heard: Arc<Mutex<Vec<(usize, bool, usize)>>> = Arc::default();
        let told = Arc::clone(&heard);
        let build = move |shard, server: &mut Server| {
            server.listen(local(), |_: &mut (), _| Idle)?;
            let told = Arc::clone(&told);
            let cooldown = Duration::from_secs(3600);
            server
                .control()
                .on_alarm(alarm, cooldown, move |(), _, notice| {
                    let mut told = told.lock().expect("no panic");
                    told.push((shard, notice.raised, notice.value));
                })?;
            Ok(())
        };
        let shards = Shards::new(Config::max_connections(CAP))
            .threads(SHARDS)
            .spawn(build)
            .expect("shards");
        let addr = tcp(&shards.listeners[0].addr);
        let told = |raised| {
            let heard = heard.lock().expect("no panic");
            let shards = heard.iter().filter(|told| told.1 == raised);
            let mut shards: Vec<_> = shards.map(|told| told.0).collect();
            shards.sort_unstable();
            shards
        };
        let mut clients: Vec<_> = (0..15).map(|_| connect(addr)).collect();
        eventually("they are inside", || shards.handle.stats().open == 15);
        assert_eq!(told(true), [0; 0]);
        clients.push(connect(addr));
        eventually("every shard raises its own", || told(true) == [0, 1, 2]);
        clients.pop();
        eventually("and clears it", || told(false) == [0, 1, 2]);
        let heard = heard.lock().expect("no panic");
        let values = heard.iter().map(|told| told.2);
        let values = values.map(|value| value - listeners);
        assert!(values.clone().all(|value| (15..=16).contains(&value)));
        drop((heard, clients));
        finish(shards);
    }
}

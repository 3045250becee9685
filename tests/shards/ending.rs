//! All shards end in order: waiting clients are served, the reports are one, and one shard may end
//! without the others.

use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use kit::net::{
    connect, current_stats, eventually, example, held_by_each, hold, local, ping, read_to_end,
    recv2, send2, tcp, ChildProcess, Echo, PostsOnDrop, PATIENCE,
};
use portcullis::{Config, Error, HandleError, Listen, Server, Shards, Spawned};

fn spawn(count: usize, listen: Listen) -> (Spawned<()>, SocketAddr) {
    let build = move |_, server: &mut Server<()>| {
        server.listen(listen.clone(), |_: &mut (), _| Echo)?;
        Ok(())
    };
    let shards = Shards::new(Config::new())
        .threads(count)
        .spawn(build)
        .expect("shards");
    let addr = tcp(&shards.listeners[0].addr);
    (shards, addr)
}

/// With one queue, and with a queue in each shard.
#[test]
fn a_drain_serves_the_backlogs() {
    for reuse_port in [false, true] {
        let (shards, addr) = spawn(
            3,
            local().with(|listen| listen.socket.reuse_port = reuse_port),
        );
        let mut inside: Vec<_> = (0..9).map(|_| connect(addr)).collect();
        for client in &mut inside {
            ping(client, b"inside");
        }
        let busy: Vec<_> = shards.handle.shards().map(|shard| hold(&shard)).collect();
        let mut waiting: Vec<_> = (0..60).map(|_| connect(addr)).collect();
        for client in waiting.iter_mut().chain(&mut inside) {
            send2(client, b"last words");
        }
        shards.handle.drain(PATIENCE).expect("they run");
        drop(busy);
        for client in waiting.iter_mut().chain(&mut inside) {
            assert_eq!(recv2(client), b"last words");
            assert_eq!(read_to_end(client), b"", "in order");
        }
        drop((waiting, inside));
        eventually("the shards end", || shards.is_finished());
        let report = shards.join().expect("no error").expect("drained");
        assert_eq!((report.ended, report.forced), (69, 0));
        TcpStream::connect(addr).expect_err("the port is closed");
    }
}

#[test]
fn one_deadline_ends_all() {
    let (shards, addr) = spawn(2, local());
    let mut clients: Vec<_> = (0..20).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"inside");
        // Half a frame, so that none ends by itself.
        std::io::Write::write_all(client, b"\0").expect("sent");
    }
    shards.handle.drain(Duration::ZERO).expect("they run");
    eventually("the shards end", || shards.is_finished());
    let report = shards.join().expect("no error").expect("drained");
    assert_eq!(report.ended + report.failed + report.forced, 20);
}

/// The others have the queue: no connect is refused, lost or reset.
#[test]
fn one_shard_ends_and_no_client_notices() {
    let (shards, addr) = spawn(3, local());
    let clients: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn(move || {
                for _ in 0..200 {
                    // One that was accepted by the shard that drains is answered all the same.
                    ping(&mut connect(addr), b"hello");
                }
            })
        })
        .collect();
    for shard in [0, 2] {
        let handle = shards.handle.shards().nth(shard).expect("a shard");
        handle.suspend_and_drain();
        eventually("it has gone", || handle.stop().is_err());
    }
    for client in clients {
        client.join().expect("served every time");
    }
    let answers = shards
        .handle
        .call_each(PATIENCE, |_, (), _| ())
        .expect("one answers");
    assert_eq!(answers, [(1, ())]);
    shards.handle.drain(PATIENCE).expect("one runs");
    eventually("the shards end", || shards.is_finished());
    assert!(
        shards.join().expect("no error").is_some(),
        "all were drained"
    );
}

trait Leave {
    fn suspend_and_drain(&self);
}

impl Leave for portcullis::Handle<()> {
    /// Admits no more clients, lets open connections finish, and ends.
    fn suspend_and_drain(&self) {
        let close = |(): &mut (), control: &mut portcullis::Control<'_, ()>| {
            let id = control.listeners()[0].id;
            control.close_listener(id)
        };
        self.call(PATIENCE, close).expect("answered").expect("open");
        eventually("those inside have gone", || current_stats(self).open == 0);
        self.drain(PATIENCE).expect("it runs");
    }
}

#[test]
fn the_example_serves_on_all_threads_and_drains_on_a_signal() {
    let mut command = Command::new(example("shards"));
    let server = ChildProcess::start(command.args(["127.0.0.1:0", "3"]));
    let addr = server.address();
    let mut clients: Vec<_> = (0..60).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"hello");
    }
    server.signal("TERM");
    for client in &mut clients {
        assert_eq!(read_to_end(client), b"");
    }
    drop(clients);
    let (status, words, log) = server.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
    let mut connections = [0; 3];
    let mut echoes = 0;
    for line in words.lines() {
        let Some((shard, rest)) = line
            .strip_prefix("shard ")
            .and_then(|rest| rest.split_once(": "))
        else {
            continue;
        };
        let (count, what) = rest.split_once(' ').expect("a count");
        let (shard, count): (usize, usize) = (
            shard.parse().expect("a number"),
            count.parse().expect("a number"),
        );
        match what {
            "connections" => connections[shard] = count,
            _ => echoes += count,
        }
    }
    assert_eq!(
        (connections.iter().sum::<usize>(), echoes),
        (60, 60),
        "{words}"
    );
    assert!(words.contains("all: 60 connections, 60 echoes"), "{words}");
    assert!(
        words.contains("60 connections ended in order, 0 otherwise, 0 were forced"),
        "{words}"
    );
}

/// What an ended shard held is not in the sums, and what it counted is.
#[test]
fn a_stopped_shard_leaves_the_sums() {
    let (shards, addr) = spawn(2, local());
    let mut clients: Vec<_> = (0..8).map(|_| connect(addr)).collect();
    for client in &mut clients {
        ping(client, b"inside");
    }
    let going = shards.handle.shards().nth(1).expect("a shard");
    let left = held_by_each(&shards)[0];
    going.stop().expect("it runs");
    eventually("it has ended", || going.stop().is_err());
    let stats = current_stats(&shards.handle);
    assert_eq!((stats.open, stats.accepted), (left, 8));
    assert_eq!(stats.closed_total(), (8 - left) as u64);
    assert_eq!(stats.traffic.frames_in, 8);
    eventually("the same is published", || {
        let published = shards.handle.stats();
        (published.open, published.accepted) == (stats.open, stats.accepted)
    });
    drop(clients);
    shards.handle.drain(PATIENCE).expect("one runs");
    eventually("the shards end", || shards.is_finished());
    assert!(shards.join().expect("no error").is_none());
}

/// A thread for which the state's destructor waits may wait for an answer: also where a later shard
/// cannot be made.
#[test]
fn a_shard_is_gone_before_its_state_is_dropped() {
    for fails in [false, true] {
        let (found, finds) = mpsc::channel();
        let build = move |shard, server: &mut Server<PostsOnDrop>| {
            if fails && shard == 1 {
                return Err(Error::other("as planned"));
            }
            let (handle, found) = (server.handle(), found.clone());
            Ok(PostsOnDrop { handle, found })
        };
        match Shards::new(Config::new()).threads(2).spawn(build) {
            Ok(shards) => {
                shards.handle.stop().expect("they run");
                assert_eq!(shards.join().expect("no error"), None);
            }
            Err(error) => assert!(fails, "{error}"),
        }
        let found: Vec<_> = finds.iter().collect();
        let gone = Err(HandleError::ServerGone);
        assert_eq!(found, vec![gone; if fails { 1 } else { 2 }]);
    }
}

//! TLS in several shards: changed in all at once, and one configuration resumes a session in any of them.
#![cfg(all(feature = "tls", any(feature = "ring", feature = "aws-lc-rs")))]

use std::sync::{mpsc, Arc, Mutex};
use std::thread;
use std::time::Duration;

use kit::net::{connect, current_stats, eventually, local, ping, tcp, Echo, PATIENCE};
use kit::tls::{handshake, notify, read_to_goodbye, secure, set_tls, Site, VERSIONS};
use portcullis::tls::rustls::{HandshakeKind, KeyLog};
use portcullis::{Alarm, Config, Connect, Framing, HandleError, Quota, Server, Shards, Spawned};

fn spawn(site: &Site) -> Spawned<()> {
    let config = Arc::new(site.server());
    let build = move |_, server: &mut Server<()>| {
        let listen = local().name("secure").tls(Arc::clone(&config));
        server.listen(listen, |_: &mut (), _| Echo)?;
        server.listen(local().name("plain"), |_: &mut (), _| Echo)?;
        Ok(())
    };
    Shards::new(Config::new())
        .threads(3)
        .spawn(build)
        .expect("shards")
}

fn finish(shards: Spawned<()>) {
    shards
        .handle
        .drain(Duration::from_secs(10))
        .expect("they run");
    eventually("the shards end", || shards.is_finished());
    assert!(shards.join().expect("no error").is_some());
}

#[test]
fn a_new_certificate_is_that_of_every_shard() {
    let (old, new) = (Site::new(), Site::new());
    let shards = spawn(&old);
    let addr = tcp(&shards.listeners[0].addr);
    ping(&mut secure(addr, &old.client(VERSIONS[0])), b"old");
    set_tls(&shards.handle, "secure", new.server()).expect("all have it");
    // They stay, so that all shards have some.
    let mut clients = Vec::new();
    for _ in 0..40 {
        let mut client = secure(addr, &new.client(VERSIONS[0]));
        ping(&mut client, b"new");
        clients.push(client);
        handshake(addr, &old.client(VERSIONS[0])).expect_err("the old certificate is gone");
    }
    assert!(shards
        .handle
        .shards()
        .all(|handle| current_stats(&handle).accepted > 1));
    let refused = set_tls(&shards.handle, "plain", new.server());
    assert!(
        matches!(refused, Err(HandleError::Refused(_))),
        "{refused:?}"
    );
    drop(clients);
    finish(shards);
}

#[test]
fn a_session_is_resumed_in_any_shard() {
    for version in VERSIONS {
        let site = Site::new();
        let shards = spawn(&site);
        let addr = tcp(&shards.listeners[0].addr);
        let config = site.client(version);
        for round in 0..30 {
            let mut client = secure(addr, &config);
            ping(&mut client, b"hello");
            let resumed = client.conn.handshake_kind() == Some(HandshakeKind::Resumed);
            assert_eq!(resumed, round > 0, "round {round}");
            notify(&mut client);
            assert_eq!(read_to_goodbye(&mut client), b"");
        }
        finish(shards);
    }
}

/// Blocks on drop.
#[derive(Debug)]
struct Sticky {
    inside: mpsc::Sender<()>,
    released: Mutex<mpsc::Receiver<()>>,
}

impl KeyLog for Sticky {
    fn log(&self, _: &str, _: &[u8], _: &[u8]) {}
}

impl Drop for Sticky {
    fn drop(&mut self) {
        let _ = self.inside.send(());
        let _ = self
            .released
            .lock()
            .expect("not poisoned")
            .recv_timeout(PATIENCE);
    }
}

/// A place that an alarm's callback has taken and given back, at the very end of its shard's turn, is found by another shard.
#[test]
fn a_place_given_back_at_the_end_of_a_turn_is_offered() {
    let site = Site::new();
    let config = Config::max_connections(2);
    let shards = Shards::new(config)
        .threads(2)
        .spawn(|_, server: &mut Server| {
            server.listen(local().name("door"), |_: &mut (), _| Echo)?;
            Ok(())
        });
    let shards = shards.expect("shards");
    let addr = tcp(&shards.listeners[0].addr);
    let mut first = connect(addr);
    ping(&mut first, b"hello");
    let handles: Vec<_> = shards.handle.shards().collect();
    eventually("it is counted", || {
        handles.iter().any(|handle| handle.stats().open == 1)
    });
    let home = handles
        .iter()
        .position(|handle| handle.stats().open == 1)
        .expect("it is in one");
    let (here, there) = (&handles[home], &handles[1 - home]);
    let ((inside, is_inside), (release, released)) = (mpsc::channel(), mpsc::channel());
    // No turn that is still to come does it by the way.
    eventually("its shard sleeps", || {
        let iterations = here.stats().iterations;
        thread::park_timeout(Duration::from_millis(50));
        here.stats().iterations == iterations
    });
    let mut tls = site.client(VERSIONS[1]);
    tls.key_log = Arc::new(Sticky {
        inside,
        released: Mutex::new(released),
    });
    // No address of ours (RFC 5737): it fails at once, with the place in hand.
    let options = Connect::new(Framing::Packet2)
        .tls(tls, "localhost")
        .with(|connect| connect.bind = Some("192.0.2.1:0".parse().expect("an address")));
    let mut options = Some(options);
    let alarmed = here.call(PATIENCE, move |(), control| {
        control.suspend("door").expect("it is there");
        let alarm = Alarm::Connections(Quota::Count(1));
        control.on_alarm(alarm, Duration::from_secs(3600), move |(), control, _| {
            if let Some(options) = options.take() {
                control
                    .connect("127.0.0.1:9", options, Echo)
                    .expect_err("not from there");
            }
        })
    });
    alarmed.expect("an answer").expect("an alarm");
    is_inside.recv_timeout(PATIENCE).expect("it tries");
    // The other shard sees that nothing is free, and leaves the queue.
    for _ in 0..2 {
        let before = there.call(PATIENCE, |(), control| control.stats().iterations);
        let before = before.expect("an answer");
        eventually("that turn is over", || there.stats().iterations > before);
    }
    release.send(()).expect("it waits");
    let mut second = connect(addr);
    ping(&mut second, b"there is a place");
    drop((first, second));
    finish(shards);
}

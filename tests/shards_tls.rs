//! TLS in several shards: changed in all at once, and one configuration resumes a session in any of them.
#![cfg(all(feature = "tls", any(feature = "ring", feature = "aws-lc-rs")))]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::tls::{handshake, notify, read_to_goodbye, secure, Site, VERSIONS};
use common::{eventually, local, ping, tcp, Echo, PATIENCE};
use portcullis::tls::rustls::HandshakeKind;
use portcullis::{Config, HandleError, Server, Shards, SpawnedShards};

fn spawn(site: &Site) -> SpawnedShards<()> {
    let config = Arc::new(site.server());
    let build = move |_, server: &mut Server<()>| {
        let listen = local().name("secure").tls(Arc::clone(&config));
        server.listen(listen, |_: &mut (), _| Echo)?;
        server.listen(local().name("plain"), |_: &mut (), _| Echo)?;
        Ok(())
    };
    Shards::new(Config::new()).threads(3).spawn(build).expect("shards")
}

fn finish(shards: SpawnedShards<()>) {
    shards.handle.drain(Duration::from_secs(10)).expect("they run");
    eventually("the shards end", || shards.is_finished());
    assert!(shards.join().expect("no error").is_some());
}

#[test]
fn a_new_certificate_is_that_of_every_shard() {
    let (old, new) = (Site::new(), Site::new());
    let shards = spawn(&old);
    let addr = tcp(&shards.listeners[0].addr);
    ping(&mut secure(addr, &old.client(VERSIONS[0])), b"old");
    shards
        .handle
        .set_tls("secure", PATIENCE, new.server())
        .expect("all have it");
    // They stay, so that all shards have some.
    let mut clients = Vec::new();
    for _ in 0..40 {
        let mut client = secure(addr, &new.client(VERSIONS[0]));
        ping(&mut client, b"new");
        clients.push(client);
        handshake(addr, &old.client(VERSIONS[0])).expect_err("the old certificate is gone");
    }
    assert!(shards.handle.shards().iter().all(|handle| handle.stats().accepted > 1));
    let refused = shards.handle.set_tls("plain", PATIENCE, new.server());
    assert!(matches!(refused, Err(HandleError::Refused(_))), "{refused:?}");
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

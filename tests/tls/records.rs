//! A TLS record that has begun is late as a frame is, whatever came before it.

#![cfg(feature = "tls")]

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use kit::net::{local, packet2, ping, spawn_echo};
use kit::tls::{encrypt, secure, Site, VERSIONS};
use portcullis::{CloseReason, Config};

/// Half a record, behind `before` in the same segment, and then nothing.
fn begun_behind(before: &[u8]) {
    let site = Site::new();
    for version in VERSIONS {
        let mut listen = local().tls(Arc::new(site.server()));
        listen.conn.frame_timeout = Duration::from_millis(100);
        listen.conn.idle_timeout = Duration::MAX;
        let server = spawn_echo(Config::new(), listen);
        let mut client = secure(server.addr(), &site.client(version));
        // From here on it is at rest between two messages.
        ping(&mut client, b"hello");
        ping(&mut client, b"hello");
        let mut wire = if before.is_empty() {
            Vec::new()
        } else {
            encrypt(&mut client.conn, &packet2(before))
        };
        let record = encrypt(&mut client.conn, &packet2(&[7; 1000]));
        wire.extend_from_slice(&record[..record.len() / 2]);
        client.sock.write_all(&wire).expect("half a record");
        server.until("it is late", |stats| {
            stats.closed(CloseReason::FrameTimeout) == 1
        });
    }
}

#[test]
fn the_first_of_a_message() {
    begun_behind(b"");
}

#[test]
fn behind_a_whole_one() {
    begun_behind(b"whole");
}

//! A server gives back every descriptor it took. One test: it counts the whole process.

use std::io::Write;
use std::time::Duration;

use kit::net::{connect, eventually, local, ping, reset};
use kit::script::{usual, Journal, ScriptedHandler};
use portcullis::{AtCapacity, CloseReason, Config, Server};

#[test]
fn descriptors_are_back_at_their_base() {
    let count = || std::fs::read_dir("/proc/self/fd").expect("proc").count();
    if !std::path::Path::new("/proc/self/fd").exists() {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI needs /proc for this test"
        );
        eprintln!("SKIPPED: there is no /proc, this test did not run");
        return;
    }
    let base = count();
    let mut between = None;
    for _ in 0..3 {
        let journal = Journal::default();
        let notes = journal.clone();
        let server = kit::net::spawn(move || {
            let mut server = Server::new(Config::max_connections(20)).expect("server");
            let service = move |_: &mut (), _| ScriptedHandler::new(notes.noting(usual));
            let listen = local().with(|listen| {
                listen.at_capacity = AtCapacity::Refuse {
                    farewell: Vec::new(),
                };
                listen.conn.linger_timeout = Duration::from_millis(100);
                listen.conn.linger_bytes = 1024;
            });
            server.listen(listen, service).expect("listen");
            (server, ())
        });
        let empty = count();
        let mut clients: Vec<_> = (0..20).map(|_| connect(server.addr())).collect();
        for client in &mut clients {
            ping(client, b"hello");
        }
        // Ten more than there is room for, and one end of each kind.
        let refused: Vec<_> = (0..10).map(|_| connect(server.addr())).collect();
        server.until("they are refused", |stats| {
            stats.closed(CloseReason::AtCapacity) == 10
        });
        reset(clients.remove(0));
        clients[0].write_all(b"\x00").expect("half a header");
        drop(clients.remove(0));
        let id = server.ask(|(), control| control.connections()[10].id);
        server.handle.kill(id).expect("alive");
        server.until("three have gone", |stats| stats.open == 17);
        drop((clients, refused));
        server.until("all have gone", |stats| stats.open == 0);
        // Ours and the peers': nothing is left but what an idle server has.
        eventually("idle again", || count() == empty);
        let (stats, ()) = server.finish();
        assert_eq!(stats.accepted, stats.closed_total());
        journal.assert_whole_lives();
        eventually("the first base", || count() == base);
        assert_eq!(*between.get_or_insert(empty), empty);
    }
}

//! A server on a thread of its own: what goes wrong in making it is told at once, what ends it is told at the end.

mod common;

use std::rc::Rc;
use std::time::Duration;

use common::{connect, local, ping, Echo};
use portcullis::{Config, Error, Server, Spawned};

#[test]
fn it_runs_until_it_is_drained() {
    // State that could not be sent to the thread is made there.
    let spawned = Server::spawn(|| {
        let mut server: Server<Rc<u32>> = Server::new(Config::new())?;
        server.listen(local().name("it"), |_: &mut Rc<u32>, _| Echo)?;
        Ok((server, Rc::new(7)))
    })
    .expect("it listens");
    assert_eq!(spawned.listeners[0].name, "it");
    let addr = spawned.listeners[0].addr.as_tcp().expect("TCP");
    let mut client = connect(addr);
    ping(&mut client, b"hello");
    assert!(!spawned.is_finished());
    spawned.handle.drain(Duration::from_secs(5)).expect("it runs");
    spawned.join().expect("no error");
}

#[test]
fn what_cannot_be_made_is_told_at_once() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("an address");
    let spawned: Result<Spawned, Error> = Server::spawn(move || {
        let mut server = Server::new(Config::new())?;
        server.listen(portcullis::Listen::tcp(addr), |_: &mut (), _| Echo)?;
        Ok((server, ()))
    });
    assert!(matches!(spawned, Err(Error::AddressInUse { .. })), "{spawned:?}");
}

#[test]
fn a_panic_in_making_it_is_the_callers() {
    let caught = std::panic::catch_unwind(|| {
        let _: Result<Spawned, Error> = Server::spawn(|| panic!("as planned (this panic belongs to the test)"));
    });
    let panic = caught.expect_err("it goes on here");
    assert!(panic
        .downcast_ref::<&str>()
        .is_some_and(|words| words.starts_with("as planned")));
}

//! A server on a thread of its own: what goes wrong in making it is told at once, what ends it is told at the end.

use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use kit::net::{connect, local, ping, read_to_end, Echo, PostsOnDrop};
use portcullis::{Config, Error, Framing, HandleError, Server, Spawned};

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
    spawned
        .handle
        .drain(Duration::from_secs(5))
        .expect("it runs");
    // It goes when it has seen the server's end, and so was there when the drain began.
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    let report = spawned.join().expect("no error").expect("it was drained");
    assert_eq!((report.ended, report.forced), (1, 0));
}

#[test]
fn one_that_is_stopped_was_not_drained() {
    let spawned = Server::spawn(|| Ok((Server::<()>::new(Config::new())?, ()))).expect("it runs");
    spawned.handle.stop().expect("it runs");
    assert_eq!(spawned.join().expect("no error"), None);
}

/// `?` takes this library's errors, and [`Error::other`] those of the program.
#[test]
fn what_is_not_the_servers_own_error_is_told_too() {
    fn failed(build: impl FnOnce() -> portcullis::Result<()> + Send + 'static) -> Error {
        let spawned: Result<Spawned, Error> = Server::spawn(move || {
            build()?;
            Ok((Server::new(Config::new())?, ()))
        });
        spawned.expect_err("it was not made")
    }
    let none: std::num::ParseIntError = "".parse::<u32>().expect_err("no number");
    let words = none.to_string();
    let error = failed(move || Err(Error::other(none)));
    assert!(
        matches!(&error, Error::Other(cause) if cause.is::<std::num::ParseIntError>()),
        "{error}"
    );
    assert_eq!(
        (error.to_string(), format!("{error:?}")),
        (words.clone(), words)
    );

    let error = failed(|| {
        "localhost:80".parse::<portcullis::Addr>()?;
        Ok(())
    });
    assert!(error.to_string().contains("names a host"), "{error}");
    let error = failed(|| Err(portcullis::HandleError::ServerGone.into()));
    assert!(
        matches!(&error, Error::Other(cause) if cause.is::<portcullis::HandleError>()),
        "{error}"
    );
}

#[cfg(feature = "tls")]
#[test]
fn a_certificate_that_is_not_there_is_told_at_once() {
    let spawned: Result<Spawned, Error> = Server::spawn(|| {
        let config = portcullis::tls::server_config("/nowhere/chain.pem", "/nowhere/key.pem")?;
        let mut server = Server::new(Config::new())?;
        server.listen(local().tls(config), |_: &mut (), _| Echo)?;
        Ok((server, ()))
    });
    let error = spawned.expect_err("there is no certificate");
    assert!(error.to_string().contains("/nowhere/chain.pem"), "{error}");
    let cause =
        std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    assert_eq!(
        cause.map(std::io::Error::kind),
        Some(std::io::ErrorKind::NotFound)
    );
}

#[test]
fn what_cannot_be_made_is_told_at_once() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("an address");
    let spawned: Result<Spawned, Error> = Server::spawn(move || {
        let mut server = Server::new(Config::new())?;
        server.listen(
            portcullis::Listen::tcp(addr, Framing::Packet2),
            |_: &mut (), _| Echo,
        )?;
        Ok((server, ()))
    });
    assert!(
        matches!(spawned, Err(Error::AddressInUse { .. })),
        "{spawned:?}"
    );
}

#[test]
fn a_panic_in_making_it_is_the_callers() {
    let caught = std::panic::catch_unwind(|| {
        let _: Result<Spawned, Error> =
            Server::spawn(|| panic!("as planned (this panic belongs to the test)"));
    });
    let panic = caught.expect_err("it goes on here");
    assert!(panic
        .downcast_ref::<&str>()
        .is_some_and(|words| words.starts_with("as planned")));
}

/// The destructor of a state may wait for threads that use the handle, and take long.
#[test]
fn a_server_is_gone_before_its_state_is_dropped() {
    let (found, finds) = mpsc::channel();
    let spawned = Server::spawn(move || {
        let server: Server<PostsOnDrop> = Server::new(Config::new())?;
        let handle = server.handle();
        Ok((server, PostsOnDrop { handle, found }))
    })
    .expect("it runs");
    spawned.handle.stop().expect("it runs");
    assert_eq!(spawned.join().expect("no error"), None);
    let posted = finds.recv().expect("the state was dropped");
    assert_eq!(posted, Err(HandleError::ServerGone));
}

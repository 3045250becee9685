//! Sockets that were passed on to this process, if any (`sd_listen_fds_with_names(3)`): `LISTEN_PID`
//! names the receiver, `LISTEN_FDNAMES` the sockets.

use std::io;
use std::os::fd::OwnedFd;

use listenfd::ListenFd;
use portcullis::{Framing, Listen};

/// Listeners on the sockets of all kinds and families, in their order, with their names.
///
/// A name that several sockets have names none of them: systemd gives the sockets of one unit the
/// name of the unit. Their listeners are named by their addresses.
pub fn sockets(framing: Framing) -> io::Result<Vec<Listen>> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut passed = ListenFd::from_env();
    let mut sockets = Vec::new();
    for at in 0..passed.len() {
        // Its error leaves the descriptor for the next kind, whose error is the last word.
        let socket = match passed.take_tcp_listener(at) {
            Ok(socket) => socket.map(OwnedFd::from),
            Err(_) => passed.take_unix_listener(at)?.map(OwnedFd::from),
        };
        sockets.extend(socket);
    }
    if sockets.is_empty() || names.is_empty() {
        let listens = sockets
            .into_iter()
            .map(|socket| Listen::adopted(socket, framing.clone()));
        return Ok(listens.collect());
    }
    let names: Vec<&str> = names.split(':').collect();
    if names.len() != sockets.len() {
        let (names, sockets) = (names.len(), sockets.len());
        let text = format!("LISTEN_FDNAMES has {names} names for {sockets} sockets");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let is_unique = |name: &&str| names.iter().filter(|other| *other == name).count() == 1;
    let listens = sockets.into_iter().zip(&names).map(|(socket, name)| {
        let listen = Listen::adopted(socket, framing.clone());
        match Some(*name)
            .filter(|name| !name.is_empty())
            .filter(is_unique)
        {
            Some(name) => listen.name(name),
            None => listen,
        }
    });
    Ok(listens.collect())
}

//! Sockets that were passed on to this process, if any (`sd_listen_fds(3)`): `LISTEN_PID` names the
//! receiver.

use std::io;
use std::os::fd::OwnedFd;

use listenfd::ListenFd;

/// The sockets, of both kinds, in their order.
pub fn sockets() -> io::Result<Vec<OwnedFd>> {
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
    Ok(sockets)
}

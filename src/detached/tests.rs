//! The time of a call, on a clock that stands until it is moved.

use std::cell::Cell;
use std::os::unix::net::UnixStream;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

thread_local! {
    static NOW: Cell<Time> = const { Cell::new(Time::ZERO) };
}

const CALLS: SystemCalls = SystemCalls {
    now: || NOW.get(),
    unsent: |_, _| None,
    end: |_, _| (),
};

fn pass(time: Duration) {
    NOW.set(NOW.get().after(time));
}

/// A socket with a read timeout of ten seconds, and its peer.
fn socket() -> (Socket, UnixStream) {
    let (ours, peer) = UnixStream::pair().expect("a pair");
    let socket = Socket::new(ours.into(), true, CALLS).expect("blocking");
    socket.set_read_timeout(Some(10 * SECOND)).expect("timeout");
    (socket, peer)
}

#[test]
fn a_limit_leaves_the_sockets_own_timeout() {
    let (socket, _peer) = socket();
    for timeout in [Some(10 * SECOND), None] {
        socket.set_read_timeout(timeout).expect("timeout");
        for time in [None, Some(SECOND)] {
            let mut limit = Limit::of(&socket, CALLS, Direction::Read);
            if let Some(time) = time {
                limit = limit.within(time);
            }
            for _ in 0..3 {
                limit.next().expect("time is left");
                pass(SECOND / 4);
            }
            drop(limit);
            assert_eq!(socket.read_timeout().expect("an option"), timeout);
        }
    }
}

#[test]
fn the_time_of_a_call_begins_with_its_first_system_call() {
    let (socket, _peer) = socket();
    let mut limit = Limit::of(&socket, CALLS, Direction::Read);
    // A long decryption, say.
    pass(60 * SECOND);
    limit.next().expect("the first");
    pass(6 * SECOND);
    limit.next().expect("time is left");
    let left = socket.read_timeout().expect("an option");
    assert_eq!(left, Some(4 * SECOND));
    pass(4 * SECOND);
    let error = limit.next().expect_err("the time is over");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn a_time_instead_of_the_timeout_begins_at_once() {
    let (socket, _peer) = socket();
    let mut limit = Limit::of(&socket, CALLS, Direction::Read).within(2 * SECOND);
    pass(SECOND);
    limit.next().expect("time is left");
    let left = socket.read_timeout().expect("an option");
    assert_eq!(left, Some(SECOND));
    pass(SECOND);
    let error = limit.next().expect_err("the time is over");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

/// Output before a read, say, whose time is the shorter one.
#[test]
fn a_time_ends_with_that_of_another() {
    let (socket, _peer) = socket();
    socket
        .set_write_timeout(Some(20 * SECOND))
        .expect("timeout");
    let mut read = Limit::of(&socket, CALLS, Direction::Read);
    let mut write = Limit::of(&socket, CALLS, Direction::Write);
    write.end_by(read.end().expect("an option"));
    for left in [10, 8] {
        write.next().expect("time is left");
        let timeout = socket.write_timeout().expect("an option");
        assert_eq!(timeout, Some(left * SECOND));
        pass(2 * SECOND);
    }
    read.next().expect("time is left");
    let timeout = socket.read_timeout().expect("an option");
    assert_eq!(timeout, Some(6 * SECOND));
    pass(6 * SECOND);
    for mut limit in [read, write] {
        let error = limit.next().expect_err("the time is over");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
    assert_eq!(socket.read_timeout().expect("an option"), Some(10 * SECOND));
    assert_eq!(
        socket.write_timeout().expect("an option"),
        Some(20 * SECOND)
    );
}

/// A call that waits and writes by turns, within one time for all writes together.
#[test]
fn a_pause_takes_none_of_the_time() {
    let (socket, _peer) = socket();
    let mut limit = Limit::of(&socket, CALLS, Direction::Read);
    for left in [10, 7, 4, 1] {
        limit.next().expect("time is left");
        let timeout = socket.read_timeout().expect("an option");
        assert_eq!(timeout, Some(left * SECOND));
        pass(3 * SECOND);
        limit.pause();
        pass(60 * SECOND);
    }
    let error = limit.next().expect_err("the time is over");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

//! A drain ends in order: no output is lost, no connection delays it past its deadline, and the
//! report is true.

use std::io::{ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use kit::net::{
    await_end, connect, eventually, hold, local, packet2, ping, read_to_end, recv2, send2,
    ReadSome, PATIENCE,
};
use kit::script::{
    connect_narrow, fill, spawn_script, usual, Call, Entry, Journal, ScriptedHandler,
};
use portcullis::{
    AtCapacity, CloseReason, Config, Context, DrainReport, Error, Listen, Outcome, Server, Stats,
};

/// Long enough for every peer that does its part.
const AMPLE: Duration = Duration::from_secs(25);

/// A server on a thread of its own whose drain report is kept.
struct Draining {
    running: Option<thread::JoinHandle<(DrainReport, Stats)>>,
    handle: portcullis::Handle,
    addr: std::net::SocketAddr,
    journal: Journal,
}

fn start<F>(config: Config, listen: Listen, play: F) -> Draining
where
    F: FnMut(&mut Context<'_>, Call<'_>) -> Outcome + Clone + Send + 'static,
{
    let journal = Journal::default();
    let notes = journal.clone();
    let (tell, told) = std::sync::mpsc::channel();
    let running = thread::spawn(move || {
        let mut server = Server::new(config).expect("server");
        let service = move |_: &mut (), _| ScriptedHandler::new(notes.noting(play.clone()));
        server.listen(listen, service).expect("listen");
        tell.send((
            server.handle(),
            kit::net::tcp(&server.control().listeners()[0].addr),
        ))
        .expect("the test waits");
        server.run(&mut ()).expect("run");
        let report = server
            .control()
            .drain_report()
            .expect("run ends with the drain");
        assert!(
            server.control().connections().is_empty() && server.control().listeners().is_empty()
        );
        let late = server.listen(local(), |_: &mut (), _| kit::net::Echo);
        assert!(matches!(late, Err(Error::Draining)), "{late:?}");
        (report, server.control().stats())
    });
    let (handle, addr) = told.recv_timeout(PATIENCE).expect("built");
    Draining {
        running: Some(running),
        handle,
        addr,
        journal,
    }
}

impl Draining {
    #[cfg(feature = "tls")]
    fn is_over(&self) -> bool {
        self.running
            .as_ref()
            .is_none_or(|running| running.is_finished())
    }

    /// Waits until `run` returns. Then every connection has had one whole life, and `on_drain` at
    /// most once.
    #[track_caller]
    fn report(&mut self) -> (DrainReport, Stats) {
        let running = self.running.take().expect("asked once");
        eventually("run returns", || running.is_finished());
        let (report, stats) = running.join().expect("no panic");
        self.journal.assert_whole_lives();
        let all = self.journal.all();
        for (id, entry) in &all {
            if *entry == Entry::Drain {
                let told = all
                    .iter()
                    .filter(|(of, entry)| of == id && *entry == Entry::Drain)
                    .count();
                assert_eq!(told, 1, "on_drain is called once");
            }
        }
        assert_eq!((stats.accepted, stats.open), (stats.closed_total(), 0));
        assert_eq!(
            report.ended + report.failed + report.forced,
            all.iter()
                .filter(|(_, entry)| *entry == Entry::Open)
                .count()
        );
        (report, stats)
    }
}

impl Drop for Draining {
    fn drop(&mut self) {
        let _ = self.handle.stop();
    }
}

/// A drain sends FIN to idle clients.
#[test]
fn idle_clients_get_a_fin() {
    let mut server = start(Config::new(), local(), usual);
    let mut clients: Vec<_> = (0..20).map(|_| connect(server.addr)).collect();
    for client in &mut clients {
        ping(client, b"hello");
    }
    server.handle.drain(AMPLE).expect("drain");
    for mut client in clients {
        assert_eq!(read_to_end(&mut client), b"");
    }
    let (report, stats) = server.report();
    assert_eq!((report.ended, report.forced), (20, 0));
    assert_eq!(stats.closed(CloseReason::Drained), 20);
    assert_eq!(server.journal.count(&Entry::Drain), 20);
    assert!(report.took < AMPLE);
}

#[test]
fn without_connections_it_is_over_at_once() {
    let mut server = start(Config::new(), local(), usual);
    server.handle.drain(Duration::MAX).expect("drain");
    let (report, stats) = server.report();
    assert_eq!((report.ended, report.forced, stats.accepted), (0, 0, 0));
    let refused =
        TcpStream::connect_timeout(&server.addr, PATIENCE).expect_err("the port is closed");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

/// A drain answers bytes that lie unread in the kernel, although the last read found nothing.
#[test]
fn what_was_in_flight_is_answered() {
    const FRAMES: u32 = 2000;
    let mut server = start(Config::new(), local(), usual);
    let mut clients: Vec<_> = (0..5).map(|_| connect(server.addr)).collect();
    for client in &mut clients {
        ping(client, b"read to the end before");
    }
    let still = hold(&server.handle);
    let mut wire = Vec::new();
    for number in 0..FRAMES {
        wire.extend(packet2(&[number.to_be_bytes(); 25].concat()));
    }
    for client in &mut clients {
        assert_eq!(fill(client, &wire), wire.len());
    }
    server.handle.drain(AMPLE).expect("drain");
    drop(still);
    for client in &mut clients {
        assert!(read_to_end(client) == wire);
    }
    drop(clients);
    let (report, stats) = server.report();
    assert_eq!((report.ended, report.forced), (5, 0));
    assert_eq!(stats.traffic.frames_in, u64::from(5 * FRAMES + 5));
}

/// The watermark had paused reading when the drain began, and more bytes have arrived since.
#[test]
fn what_arrived_while_reading_was_paused_is_answered() {
    let listen = local().with(|listen| {
        listen.conn.low_watermark = 1024;
        listen.conn.high_watermark = 16 * 1024;
        listen.socket.send_buffer = Some(16 * 1024);
    });
    let mut server = start(Config::new(), listen, |cx, call| match call {
        Call::Frame(frame) => {
            cx.conn.send(frame.repeat(5000))?;
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut client = connect_narrow(server.addr);
    for number in 0..=250u8 {
        send2(&mut client, &[number]);
    }
    eventually("output waits", || {
        let info = server
            .handle
            .call(PATIENCE, |(), control| control.connections())
            .expect("answer");
        info.first().is_some_and(|info| info.queued > 1024)
    });
    server.handle.drain(AMPLE).expect("drain");
    // Still to come when the drain is on: it is no new client, and its requests were sent before the FIN.
    for number in 0..=250u8 {
        assert!(recv2(&mut client) == vec![number; 5000]);
    }
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    assert_eq!(server.report().0.forced, 0);
}

/// A slow reader gets all pending output and then FIN, while no new client is accepted.
#[test]
fn a_slow_reader_gets_all_it_was_owed() {
    const FRAMES: usize = 150;
    let listen = local().with(|listen| listen.conn.output_limit = 16 * 1024 * 1024);
    let mut server = start(Config::new(), listen, |cx, call| match call {
        Call::Frame(_) => {
            for _ in 0..FRAMES {
                cx.conn.send([9; 60_000])?;
            }
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut client = connect_narrow(server.addr);
    send2(&mut client, b"nine megabytes");
    eventually("output waits", || {
        server.handle.stats().traffic.frames_out == FRAMES as u64
    });
    server.handle.drain(AMPLE).expect("drain");
    for _ in 0..FRAMES {
        assert!(recv2(&mut client) == [9; 60_000]);
    }
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    let (report, stats) = server.report();
    assert_eq!((report.ended, report.forced), (1, 0));
    assert_eq!(stats.closed(CloseReason::Drained), 1);
}

/// A connection that does not end by itself is ended at the one deadline.
#[test]
fn the_stuck_are_forced() {
    // None is evicted, however long it takes to fill the cap.
    let listen = local().with(|listen| {
        listen.evict_silent = false;
        listen.socket.send_buffer = Some(16 * 1024);
        listen.at_capacity = AtCapacity::Wait;
    });
    let mut server = start(Config::max_connections(4), listen, |cx, call| match call {
        Call::Frame(b"flood") => {
            for _ in 0..10 {
                cx.conn.send([1; 60_000])?;
            }
            Ok(())
        }
        Call::Frame(b"pause") => {
            cx.conn.pause();
            cx.conn.send(b"paused")?;
            Ok(())
        }
        // Stays.
        Call::Drain
            if cx
                .conn
                .info()
                .is_some_and(|info| info.traffic.frames_in == 0) =>
        {
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut stuck = connect_narrow(server.addr);
    send2(&mut stuck, b"flood");
    let mut half = connect(server.addr);
    ping(&mut half, b"whole");
    half.write_all(b"\x00\x09half").expect("write");
    let mut paused = connect(server.addr);
    ping_paused(&mut paused);
    let mut stays = connect(server.addr);
    eventually("all are in", || server.handle.stats().opened == 4);
    // The cap is full: this one cannot be served any more.
    let mut outside = connect(server.addr);
    server
        .handle
        .drain(Duration::from_millis(500))
        .expect("drain");
    for client in [&mut half, &mut stays, &mut paused] {
        let error = client.read_some(&mut [0; 16]).expect_err("RST");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    await_end(&mut stuck);
    await_end(&mut outside);
    let (report, stats) = server.report();
    assert_eq!((report.ended, report.forced), (0, 4));
    assert_eq!(stats.closed(CloseReason::DrainForced), 4);
    assert_eq!(server.journal.reasons(), [CloseReason::DrainForced; 4]);
    assert_eq!(server.journal.count(&Entry::Drain), 4);
}

fn ping_paused(client: &mut TcpStream) {
    send2(client, b"pause");
    assert_eq!(recv2(client), b"paused");
}

/// A client that connected before the drain is served, although it was not accepted yet.
#[test]
fn clients_in_the_accept_queue_are_served() {
    let mut server = start(Config::new(), local(), usual);
    let still = hold(&server.handle);
    let mut clients: Vec<_> = (0..100).map(|_| connect(server.addr)).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        send2(client, &[number as u8; 100]);
    }
    server.handle.drain(AMPLE).expect("drain");
    drop(still);
    for (number, mut client) in clients.into_iter().enumerate() {
        assert_eq!(
            read_to_end(&mut client),
            packet2(&[number as u8; 100]),
            "client {number}"
        );
    }
    let (report, stats) = server.report();
    assert_eq!((report.ended, report.forced, stats.accepted), (100, 0, 100));
}

/// The accept budget spreads the backlog over many iterations; no client is lost.
#[test]
fn the_accept_budget_loses_no_client_in_the_queue() {
    let mut server = start(
        Config::new().with(|config| {
            config.budgets.accepts = 1;
            config.budgets.read_bytes = 1;
        }),
        local(),
        usual,
    );
    let still = hold(&server.handle);
    let mut clients: Vec<_> = (0..60).map(|_| connect(server.addr)).collect();
    for client in &mut clients {
        client
            .write_all(&packet2(b"served").repeat(10))
            .expect("write");
    }
    server.handle.drain(AMPLE).expect("drain");
    drop(still);
    for mut client in clients {
        assert_eq!(read_to_end(&mut client), packet2(b"served").repeat(10));
    }
    assert_eq!(server.report().0.ended, 60);
}

#[cfg(feature = "tls")]
#[test]
fn an_unfinished_handshake_does_not_hold_it_up() {
    let config = std::sync::Arc::new(kit::tls::Site::new().server());
    let mut server = start(Config::new(), local().tls(config), usual);
    let mut client = connect(server.addr);
    eventually("it is in", || server.handle.stats().accepted == 1);
    let start = std::time::Instant::now();
    server.handle.drain(AMPLE).expect("drain");
    await_end(&mut client);
    eventually("run returns", || server.is_over());
    assert!(start.elapsed() < AMPLE / 2);
    let (report, stats) = server
        .running
        .take()
        .expect("ran")
        .join()
        .expect("no panic");
    assert_eq!((report.ended, report.failed, report.forced), (0, 1, 0));
    assert_eq!(stats.closed(CloseReason::HandshakeTimeout), 1);
}

#[test]
fn a_second_drain_only_brings_the_deadline_forward() {
    let mut server = start(Config::new(), local(), |cx, call| match call {
        Call::Drain => Ok(()),
        call => usual(cx, call),
    });
    let mut client = connect(server.addr);
    ping(&mut client, b"hello");
    server.handle.drain(Duration::MAX).expect("drain");
    eventually("told", || server.journal.count(&Entry::Drain) == 1);
    // A client that stays is served.
    ping(&mut client, b"still served");
    server
        .handle
        .drain(Duration::from_millis(50))
        .expect("again");
    // A later deadline is none.
    server.handle.drain(Duration::MAX).expect("again");
    assert_eq!(
        client.read_some(&mut [0; 16]).expect_err("RST").kind(),
        ErrorKind::ConnectionReset
    );
    let (report, _) = server.report();
    assert_eq!((report.ended, report.forced), (0, 1));
}

#[test]
fn a_grace_of_zero_resets_at_once() {
    let mut server = start(Config::new(), local(), usual);
    let mut clients: Vec<_> = (0..3).map(|_| connect(server.addr)).collect();
    for client in &mut clients {
        ping(client, b"hello");
    }
    server.handle.drain(Duration::ZERO).expect("drain");
    for client in &mut clients {
        await_end(client);
    }
    let (report, _) = server.report();
    assert_eq!(report.ended + report.failed + report.forced, 3);
}

/// The port closes first; open connections may finish.
#[test]
fn new_clients_are_refused_while_the_old_finish() {
    let mut server = start(Config::new(), local(), |cx, call| match call {
        // Says goodbye, and closes when it is answered.
        Call::Drain => {
            assert!(cx.conn.is_draining());
            cx.conn.send(b"last orders")?;
            Ok(())
        }
        Call::Frame(b"done") => {
            cx.conn.send(b"bye")?;
            cx.conn.close();
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut client = connect(server.addr);
    ping(&mut client, b"hello");
    server.handle.drain(AMPLE).expect("drain");
    assert_eq!(recv2(&mut client), b"last orders");
    let refused =
        TcpStream::connect_timeout(&server.addr, PATIENCE).expect_err("the port is closed");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    ping(&mut client, b"one more");
    send2(&mut client, b"done");
    assert_eq!(read_to_end(&mut client), packet2(b"bye"));
    drop(client);
    let (report, stats) = server.report();
    assert_eq!((report.ended, report.forced), (1, 0));
    assert_eq!(stats.closed(CloseReason::Drained), 1);
}

/// A peer that got all output and FIN, and keeps its own side open, is neither reset nor forced.
/// Without its FIN nothing proves that it got everything.
#[test]
fn a_connection_that_only_lingers_at_the_deadline_is_not_forced() {
    let listen = local().with(|listen| {
        listen.conn.linger_timeout = Duration::MAX;
        listen.conn.linger_bytes = usize::MAX;
    });
    let mut server = start(Config::new(), listen, usual);
    let mut client = connect(server.addr);
    ping(&mut client, b"hello");
    server
        .handle
        .drain(Duration::from_millis(300))
        .expect("drain");
    let (report, stats) = server.report();
    assert_eq!((report.ended, report.failed, report.forced), (0, 1, 0));
    assert_eq!(stats.closed(CloseReason::Drained), 1);
    assert_eq!(read_to_end(&mut client), b"");
}

/// Work that takes a while, ended by a timer with [`portcullis::Conn::close_after_input`].
#[test]
fn a_handler_may_finish_its_work_within_the_grace() {
    let mut server = start(Config::new(), local(), |cx, call| match call {
        Call::Drain => {
            cx.conn.set_timer(1, Duration::from_millis(100));
            Ok(())
        }
        Call::Timer(_) => {
            cx.conn.send(b"the result")?;
            cx.conn.close_after_input();
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut client = connect(server.addr);
    ping(&mut client, b"work");
    server.handle.drain(AMPLE).expect("drain");
    assert_eq!(recv2(&mut client), b"the result");
    assert_eq!(read_to_end(&mut client), b"");
    drop(client);
    assert_eq!(server.report().0.forced, 0);
}

/// Each end has its own reason, also during a drain.
#[test]
fn the_report_counts_every_kind_of_end() {
    let mut server = start(Config::new(), local(), |cx, call| match call {
        Call::Drain
            if cx
                .conn
                .info()
                .is_some_and(|info| info.traffic.frames_in == 2) =>
        {
            Err(portcullis::Close::because("no time"))
        }
        Call::Drain
            if cx
                .conn
                .info()
                .is_some_and(|info| info.traffic.frames_in == 3) =>
        {
            panic!("in on_drain")
        }
        Call::Drain
            if cx
                .conn
                .info()
                .is_some_and(|info| info.traffic.frames_in == 4) =>
        {
            Ok(())
        }
        Call::Drain
            if cx
                .conn
                .info()
                .is_some_and(|info| info.traffic.frames_in == 5) =>
        {
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut clients: Vec<_> = (0..5).map(|_| connect(server.addr)).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        for _ in 0..=number {
            ping(client, b"hello");
        }
    }
    server.handle.drain(AMPLE).expect("drain");
    eventually("told", || server.journal.count(&Entry::Drain) == 5);
    clients[3].shutdown(Shutdown::Write).expect("FIN");
    // All but the last end by themselves, and none lingers.
    let mut last = clients.pop().expect("five");
    for client in &mut clients {
        assert_eq!(read_to_end(client), b"");
    }
    drop(clients);
    server.journal.until_closed(4);
    server
        .handle
        .drain(Duration::from_millis(1))
        .expect("again");
    await_end(&mut last);
    let (report, stats) = server.report();
    assert_eq!((report.ended, report.failed, report.forced), (2, 2, 1));
    for reason in [
        CloseReason::Drained,
        CloseReason::Failed,
        CloseReason::Panicked,
        CloseReason::Finished,
        CloseReason::DrainForced,
    ] {
        assert_eq!(stats.closed(reason), 1, "{reason}");
    }
}

#[test]
fn clients_of_a_suspended_listener_are_served() {
    let (server, journal) = spawn_script(Config::new(), local(), usual);
    let mut client = connect(server.addr());
    ping(&mut client, b"hello");
    let port = server.addr().port();
    server
        .ask(move |(), control| control.suspend(port))
        .expect("suspended");
    let mut waiting = connect(server.addr());
    send2(&mut waiting, b"patient");
    server.handle.drain(AMPLE).expect("drain");
    assert_eq!(read_to_end(&mut client), b"");
    assert_eq!(read_to_end(&mut waiting), packet2(b"patient"));
    drop((client, waiting));
    let (stats, ()) = server.finish_drained();
    assert_eq!((stats.accepted, stats.closed(CloseReason::Drained)), (2, 2));
    journal.assert_whole_lives();
}

trait FinishDrained {
    fn finish_drained(self) -> (Stats, ());
}

impl FinishDrained for kit::net::Running {
    /// [`kit::net::Running::finish`], for one that may have ended already.
    fn finish_drained(self) -> (Stats, ()) {
        let handle = self.handle.clone();
        eventually("the server is gone", || handle.drain(AMPLE).is_err());
        (handle.stats(), ())
    }
}

/// A drain that a job starts, from the loop itself; connections with a hold do not prevent it.
#[test]
fn a_job_may_drain() {
    let (server, _journal) = spawn_script(Config::new(), local(), usual);
    let mut client = connect(server.addr());
    ping(&mut client, b"hello");
    let still = hold(&server.handle);
    send2(&mut client, b"in flight");
    server
        .handle
        .post(|(), control| control.drain(AMPLE))
        .expect("post");
    drop(still);
    assert_eq!(read_to_end(&mut client), packet2(b"in flight"));
    drop(client);
    assert_eq!(server.finish_drained().0.closed(CloseReason::Drained), 1);
}

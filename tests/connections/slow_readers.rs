//! A peer that does not read costs a bounded amount of memory and its own connection, and no other
//! client anything.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use kit::net::{
    await_end, connect, current_stats, eventually, local, packet2, ping, recv2, send2, spawn,
    Running,
};
use kit::script::{connect_narrow, fill, spawn_script, usual, Call, Entry};
use portcullis::{
    CloseReason, Config, ConnConfig, ConnId, ConnInfo, Context, Handler, Listen, Outcome,
    SendError, Server,
};

const HIGH: usize = 64 * 1024;
const LOW: usize = 16 * 1024;
const LIMIT: usize = 256 * 1024;
/// The largest answer, with its header.
const FRAME: usize = 60_002;

/// A listener where little is enough: the kernel's buffers are small, so that ours fill.
fn tight() -> Listen {
    local().with(|listen| {
        tight_conn(&mut listen.conn);
        listen.socket.send_buffer = Some(16 * 1024);
    })
}

fn tight_conn(conn: &mut ConnConfig) {
    conn.low_watermark = LOW;
    conn.high_watermark = HIGH;
    conn.output_limit = LIMIT;
}

/// A flood of requests from a client that reads no answers; returns when the server has stopped
/// reading too.
fn flood(server: &Running) -> (TcpStream, usize) {
    let mut client = connect_narrow(server.addr());
    let mut wire = Vec::new();
    for number in 0..20_000u32 {
        wire.extend(packet2(
            &[number.to_be_bytes(), [0; 4]].concat().repeat(100),
        ));
    }
    // Until the kernels' buffers are full and stay full: neither side reads.
    let mut sent = 0;
    let mut quiet = 0;
    while quiet < 20 {
        let more = fill(&mut client, &wire[sent..]);
        assert!(sent + more < wire.len(), "the server reads on and on");
        sent += more;
        quiet = if more == 0 { quiet + 1 } else { 0 };
        // A round trip through the loop: it has seen what there was.
        server.ask(|(), _| ());
    }
    (client, sent)
}

fn only(server: &Running) -> ConnInfo {
    server.ask(|(), control| control.connections()[0].clone())
}

/// While a client does not read, reading from it stops at the high watermark.
#[test]
fn reading_stops_and_memory_is_bounded() {
    let (server, _journal) = spawn_script(Config::new(), tight(), usual);
    let (client, sent) = flood(&server);
    let info = only(&server);
    // One frame over the mark at the most, and one read of requests that wait for their turn.
    assert!(info.queued >= LOW && info.queued <= HIGH + FRAME, "{info}");
    assert!(
        info.buffered <= HIGH + FRAME + 64 * 1024 + 65_537,
        "{info:?}"
    );
    assert!(
        (info.traffic.bytes_in as usize) < sent + 1 && info.traffic.frames_in > 0,
        "{info}"
    );
    // It stays so, and no other client notices.
    let mut other = connect(server.addr());
    for _ in 0..100 {
        ping(&mut other, b"still served");
    }
    let later = server.ask(move |(), control| {
        control
            .connections()
            .into_iter()
            .find(|found| found.id == info.id)
            .expect("there")
    });
    assert_eq!(
        (later.queued, later.traffic.bytes_in),
        (info.queued, info.traffic.bytes_in)
    );
    drop(client);
}

/// A client that reads again gets everything, once.
#[test]
fn a_client_that_reads_again_gets_everything_once() {
    let (server, journal) = spawn_script(Config::new(), tight(), usual);
    let (mut client, sent) = flood(&server);
    let frame = 802;
    let whole = sent / frame;
    for number in 0..whole {
        let expected = [(number as u32).to_be_bytes(), [0; 4]].concat().repeat(100);
        assert!(recv2(&mut client) == expected, "frame {number}");
    }
    // The rest of the frame in which the kernel's buffer was full.
    if sent % frame > 0 {
        let expected = [(whole as u32).to_be_bytes(), [0; 4]].concat().repeat(100);
        client
            .write_all(&packet2(&expected)[sent % frame..])
            .expect("write");
        assert!(recv2(&mut client) == expected);
    }
    ping(&mut client, b"as before");
    assert!(journal.count(&Entry::Writable) > 0);
    drop(client);
    assert_eq!(journal.until_closed(1), [CloseReason::Finished]);
}

/// Pending output that makes no progress is bounded in time too.
#[test]
fn the_write_timeout_ends_a_peer_that_takes_nothing() {
    let listen = tight().with(|listen| {
        listen.conn.write_timeout = Duration::from_millis(300);
        listen.conn.idle_timeout = Duration::MAX;
    });
    let (server, journal) = spawn_script(Config::new(), listen, usual);
    let mut other = connect(server.addr());
    ping(&mut other, b"first");
    let (mut client, _) = flood(&server);
    assert_eq!(journal.until_closed(1), [CloseReason::WriteTimeout]);
    await_end(&mut client);
    ping(&mut other, b"unharmed, and silent for longer than that");
    assert_eq!(current_stats(&server.handle).open, 1);
}

/// A reader that is slow but takes something now and then is not ended by the write timeout.
#[test]
fn a_slow_reader_keeps_its_connection() {
    let listen = tight().with(|listen| {
        listen.conn.write_timeout = Duration::from_secs(5);
        listen.conn.idle_timeout = Duration::from_secs(5);
    });
    let (server, journal) = spawn_script(Config::new(), listen, |cx, call| match call {
        Call::Frame(_) => {
            for _ in 0..4 {
                cx.conn.send([7; FRAME - 2])?;
            }
            Ok(())
        }
        call => usual(cx, call),
    });
    let mut client = connect_narrow(server.addr());
    for _ in 0..5 {
        send2(&mut client, b"four, please");
    }
    for _ in 0..20 {
        assert!(recv2(&mut client) == [7; FRAME - 2]);
        server.ask(|(), _| ());
    }
    drop(client);
    assert_eq!(journal.until_closed(1), [CloseReason::Finished]);
}

/// A handler that sends unprompted reaches the output limit, and is notified when there is room.
#[test]
fn a_pushing_handler_is_told_full_and_then_writable() {
    let (server, journal) = spawn_script(Config::new(), tight(), {
        let mut next = 0u32;
        move |cx, call| {
            if matches!(call, Call::Frame(_) | Call::Writable) {
                loop {
                    let mut frame = [0; 5000];
                    frame[..4].copy_from_slice(&next.to_be_bytes());
                    match cx.conn.send(frame) {
                        Ok(()) => next += 1,
                        Err(SendError::Full { queued, limit }) => {
                            assert!(
                                limit == LIMIT && (LIMIT..LIMIT + 5002).contains(&queued),
                                "{queued}"
                            );
                            assert_eq!(queued, cx.conn.queued());
                            return Ok(());
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            usual(cx, call)
        }
    });
    let mut client = connect_narrow(server.addr());
    send2(&mut client, b"push");
    eventually("it is full", || {
        let info = server.ask(|(), control| control.connections());
        info.first().is_some_and(|info| info.queued > HIGH)
    });
    assert!(only(&server).queued <= LIMIT + 5002);
    // Several times through the limit and back: each frame once and in order.
    for number in 0..400u32 {
        let frame = recv2(&mut client);
        assert_eq!(frame[..4], number.to_be_bytes());
    }
    assert!(journal.count(&Entry::Writable) >= 3);
    drop(client);
    journal.until_closed(1);
}

/// Sends every frame to every connection.
struct Chat;

impl Handler<Vec<ConnId>> for Chat {
    fn on_open(&mut self, cx: &mut Context<'_, Vec<ConnId>>) -> Outcome {
        cx.app.push(cx.conn.id());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Vec<ConnId>>, frame: &[u8]) -> Outcome {
        for &id in &*cx.app {
            if let Some(mut peer) = cx.conn.peer(id) {
                // A member that does not read misses this one.
                let _ = peer.send(frame);
            }
        }
        Ok(())
    }
}

#[test]
fn a_broadcast_to_a_stuck_peer_does_not_grow() {
    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(tight(), |_: &mut Vec<ConnId>, _| Chat)
            .expect("listen");
        (server, Vec::new())
    });
    let stuck = connect_narrow(server.addr());
    server.until("it is in", |stats| stats.opened == 1);
    let mut speaker = connect(server.addr());
    let words = [3; 10_000];
    for _ in 0..200 {
        ping(&mut speaker, &words);
        let most =
            server.ask(|_, control| control.connections().iter().map(|info| info.queued).max());
        assert!(most.expect("connections") <= LIMIT + 10_002);
    }
    let peer = stuck.local_addr().expect("addr");
    let (id, queued) = server.ask(move |_, control| {
        let info = control
            .connections()
            .into_iter()
            .find(|info| info.peer == peer)
            .expect("there");
        (info.id, info.queued)
    });
    assert!(
        queued >= LIMIT,
        "two megabytes were too much for it: {queued}"
    );
    // A handle is told nothing at once, but what comes of it is counted.
    let before = current_stats(&server.handle).undeliverable;
    server.handle.send(id, vec![1; 100]).expect("queued");
    server.until("it is counted", |stats| stats.undeliverable == before + 1);
    drop((stuck, speaker));
    server.finish();
}

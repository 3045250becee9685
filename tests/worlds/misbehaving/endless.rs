//! What would never end is bounded, and others are served meanwhile.

use std::time::Duration;

use portcullis::sim::ClientState::{self, Connected, Reset};
use portcullis::CloseReason::{self, DrainForced, Finished, Killed, SlowConsumer, WriteTimeout};
use portcullis::{Config, HandleError, Listen, SendError};

use super::harness::{behave, harness, harness_of, lines, Call, Cx, Welcome};

/// Neither the idle timeout nor the frame timeout ends a paused connection; a kill does, and a
/// drain.
#[test]
fn pauses_for_ever() {
    for drains in [false, true] {
        let hour = Duration::from_secs(3600);
        let listen = lines().with(|listen| {
            listen.conn.idle_timeout = 2 * hour;
            listen.conn.frame_timeout = hour;
        });
        let mut harness = harness_of(Config::new(), listen, Welcome::Accept, |cx, call| {
            if let Call::Frame(_) = call {
                cx.conn.pause();
            }
            behave(cx, call)
        });
        let client = harness.enter();
        harness.say(client, "one\ntwo\nthr");
        harness.sim.finish(client);
        let iterations = harness.sim.stats().iterations;
        for _ in 0..24 {
            harness.sim.advance(hour);
            harness.serve(harness.bystander, "another hour\n");
        }
        assert_eq!(
            (harness.sim.state(client), harness.heard(client).as_str()),
            (Connected, "one\n")
        );
        assert_eq!(harness.sim.stats().closed_total(), 0);
        assert!(
            harness.sim.stats().iterations - iterations < 24 * 10,
            "it wakes nobody up"
        );
        if drains {
            harness.sim.control().drain(Duration::from_secs(5));
            harness.sim.settle();
            assert_eq!(harness.leave(harness.bystander), ClientState::Finished);
            assert_eq!(harness.sim.state(client), Connected, "it has its grace");
            harness.sim.advance(Duration::from_secs(6));
            let report = harness.sim.drain_report().expect("over");
            assert_eq!(
                (report.ended, report.forced, harness.sim.descriptors()),
                (1, 1, 0)
            );
            assert_eq!(
                harness.sim.app().reasons,
                [(0, CloseReason::Drained), (1, DrainForced)]
            );
            assert_eq!(harness.sim.app().told, ["open", "frame", "drain", "close"]);
            assert_eq!(harness.sim.state(client), Reset);
        } else {
            let id = harness.sim.app().ids[1];
            assert!(harness.sim.control().kill(id));
            harness.sim.settle();
            assert_eq!(harness.sim.app().told, ["open", "frame", "close"]);
            assert_eq!(
                (harness.sim.state(client), harness.heard(client)),
                (Reset, String::new())
            );
            harness.ended(Killed);
            harness.end(0);
        }
    }
}

/// Messages that beget messages: the queue stays bounded, and so does a turn.
#[test]
fn floods_its_own_handle() {
    const QUEUE: usize = 10;
    const BUDGET: usize = 4;
    let config = Config::new().with(|config| {
        config.queue_limits.commands = QUEUE;
        config.queue_limits.bytes = 2000;
        config.budgets.commands = BUDGET;
    });
    let mut harness = harness_of(config, lines(), Welcome::Accept, |cx, call| {
        let (id, handle) = (cx.conn.id(), cx.app.handle());
        match call {
            Call::Frame(b"bytes\n") => {
                for _ in 0..5 {
                    let sent = handle.send(id, vec![b'x'; 1200]);
                    cx.app.results.push(format!("{sent:?}"));
                }
                return Ok(());
            }
            Call::Frame(b"flood\n") => {
                for _ in 0..50 {
                    let posted = handle.post(|log, _| log.count += 1);
                    let noted = handle.notify(id, ());
                    cx.app
                        .results
                        .extend([format!("{posted:?}"), format!("{noted:?}")]);
                }
                return Ok(());
            }
            Call::Message(_) => {
                for _ in 0..3 {
                    // Refused as often as not: the queue is full.
                    let _ = handle.notify(id, ());
                }
            }
            _ => {}
        }
        behave(cx, call)
    });
    let count = |results: &[String], wanted: &str| {
        results.iter().filter(|result| *result == wanted).count()
    };
    let full = format!("Err({:?})", HandleError::QueueFull);
    let client = harness.enter();
    harness.say(client, "bytes\n");
    let results = std::mem::take(&mut harness.sim.app_mut().results);
    assert_eq!((count(&results, "Ok(())"), count(&results, &full)), (1, 4));
    assert_eq!(harness.heard(client), "x".repeat(1200));
    harness.sim.send(client, b"flood\n");
    harness.sim.step();
    let results = std::mem::take(&mut harness.sim.app_mut().results);
    assert_eq!(
        (count(&results, "Ok(())"), count(&results, &full)),
        (QUEUE, 100 - QUEUE)
    );
    let mut served = 0;
    for turn in 0..500 {
        let before = harness.sim.app().times("message") + harness.sim.app().count;
        if turn % 5 == 0 {
            harness.sim.send(harness.bystander, b"ping\n");
        }
        harness.sim.step();
        let done = harness.sim.app().times("message") + harness.sim.app().count - before;
        assert!((1..=BUDGET).contains(&done), "{done} commands in a turn");
        served += harness.heard(harness.bystander).len();
    }
    assert_eq!(served, 100 * "ping\n".len());
    // A request to end the server arrives although the queue is full.
    let (id, handle) = (harness.sim.app().ids[1], harness.sim.handle());
    assert_eq!(
        (handle.notify(id, ()), handle.stop()),
        (Err(HandleError::QueueFull), Ok(()))
    );
    harness.sim.app_mut().over = true;
    harness.sim.settle();
    assert_eq!(harness.leave(client), ClientState::Finished);
    harness.ended(Finished);
    harness.end(0);
}

/// It is due in every turn, and once in each.
#[test]
fn sets_a_timer_to_zero_for_ever() {
    let mut harness = harness(|cx, call| {
        if matches!(call, Call::Open | Call::Timer(_)) {
            cx.conn.set_timer(0, Duration::ZERO);
        }
        behave(cx, call)
    });
    let client = harness.enter();
    for turn in 1..=200 {
        // Time that stands still makes nothing due.
        harness.sim.leap(Duration::from_nanos(1));
        harness.sim.send(harness.bystander, b"ping\n");
        harness.sim.step();
        assert_eq!(harness.sim.app().times("timer"), turn);
    }
    harness.sim.settle();
    assert_eq!(harness.heard(harness.bystander), "ping\n".repeat(200));
    harness.serve(client, "served too\n");
    assert_eq!(harness.leave(client), ClientState::Finished);
    harness.ended(Finished);
    harness.end(0);
}

/// A line of a hundred bytes.
const LINE: [u8; 100] = {
    let mut line = [b'x'; 100];
    line[99] = b'\n';
    line
};

/// Sends until it is refused: what waits reaches the output limit, and no more.
fn flood(cx: &mut Cx<'_>) -> Result<(), SendError> {
    loop {
        cx.conn.send(LINE)?;
        cx.app.count += LINE.len();
    }
}

const LIMIT: usize = 2000;

fn narrow() -> Listen {
    lines().with(|listen| {
        listen.conn.low_watermark = 100;
        listen.conn.high_watermark = 1000;
        listen.conn.output_limit = LIMIT;
        listen.conn.write_timeout = Duration::from_secs(5);
    })
}

#[test]
fn sends_without_end_to_a_peer_that_does_not_read() {
    let mut harness = harness_of(
        Config::new(),
        narrow(),
        Welcome::Accept,
        |cx, call| match call {
            Call::Frame(_) | Call::Writable => {
                let refused = flood(cx);
                cx.app.results.push(format!("{refused:?}"));
                Ok(())
            }
            call => behave(cx, call),
        },
    );
    let client = harness.enter();
    harness.sim.set_reading(client, false);
    harness.sim.set_send_buffer(client, 150);
    harness.say(client, "flood\nflood\nflood\n");
    // The socket has taken what it has room for; the queue is at its limit, within one frame.
    let queued = harness.sim.app().count - 150;
    assert!((LIMIT..LIMIT + LINE.len()).contains(&queued), "{queued}");
    let full = SendError::Full {
        queued,
        limit: LIMIT,
    };
    // Reading stops by itself: one frame is delivered.
    assert_eq!(harness.sim.app().results, [format!("Err({full:?})")]);
    let info = harness.sim.control().connections().pop().expect("there");
    assert_eq!(
        (info.queued, info.buffered - info.queued),
        (queued, "flood\nflood\n".len())
    );
    harness.serve(harness.bystander, "unharmed\n");
    harness.sim.advance(Duration::from_secs(6));
    assert_eq!(
        (harness.sim.state(client), harness.heard(client)),
        (Reset, String::new())
    );
    harness.ended(WriteTimeout);
    harness.end(0);
}

/// The peer reads, and is sent more for ever.
#[test]
fn sends_without_end_to_a_peer_that_reads() {
    let mut harness = harness_of(
        Config::new(),
        narrow(),
        Welcome::Accept,
        |cx, call| match call {
            Call::Frame(_) | Call::Writable => {
                let _ = flood(cx);
                Ok(())
            }
            call => behave(cx, call),
        },
    );
    let client = harness.enter();
    harness.sim.set_send_buffer(client, 150);
    harness.sim.send(client, b"flood\n");
    let mut heard = 0;
    for _ in 0..500 {
        harness.sim.send(harness.bystander, b"ping\n");
        harness.sim.step();
        heard += harness.heard(client).len();
        let connections = harness.sim.control().connections();
        assert!(
            connections
                .iter()
                .all(|info| info.buffered < LIMIT + LINE.len()),
            "{connections:?}"
        );
    }
    assert!(heard > 10 * LIMIT, "{heard}");
    harness.sim.app_mut().over = true;
    harness.sim.settle();
    heard += harness.heard(client).len();
    assert_eq!(heard, harness.sim.app().count, "all that was taken, once");
    assert_eq!(harness.heard(harness.bystander), "ping\n".repeat(500));
    assert_eq!(harness.leave(client), ClientState::Finished);
    harness.ended(Finished);
    harness.end(0);
}

/// With `?` it closes with that error, and the peer gets what was taken.
#[test]
fn sends_until_its_own_error_ends_it() {
    let mut harness = harness_of(
        Config::new(),
        narrow(),
        Welcome::Accept,
        |cx, call| match call {
            Call::Frame(_) => Ok(flood(cx)?),
            call => behave(cx, call),
        },
    );
    let client = harness.enter();
    harness.say(client, "flood\n");
    assert_eq!(harness.leave(client), ClientState::Finished);
    let heard = harness.heard(client);
    assert!(heard.len() > LIMIT, "{}", heard.len());
    assert!(heard.as_bytes().chunks(LINE.len()).all(|line| line == LINE));
    harness.ended(SlowConsumer);
    harness.end(0);
}

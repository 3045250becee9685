//! In a loop with a fixed tick, what the network may do in one turn is bounded, however much players send; and the game tells
//! how punctual it was.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kit::net::{connect, example, local, packet2, recv2, send2, ChildProcess, PATIENCE};
use portcullis::{Config, Context, Handler, Outcome, Rate, Server};

/// The example's own.
const BURST: u64 = 8;
const PLAYERS: usize = 6;

/// A client that sends as fast as it can, until its connection is shut down.
fn flood(addr: SocketAddr, frame: &[u8]) -> (TcpStream, JoinHandle<()>) {
    let (client, many) = (connect(addr), packet2(frame).repeat(10_000));
    let mut writer = client.try_clone().expect("a descriptor");
    writer.set_write_timeout(Some(PATIENCE)).expect("timeout");
    let thread = thread::spawn(move || while writer.write_all(&many).is_ok() {});
    (client, thread)
}

fn stop(floods: Vec<(TcpStream, JoinHandle<()>)>) {
    for (client, thread) in floods {
        // Gone already, if the server is.
        let _ = client.shutdown(Shutdown::Both);
        thread.join().expect("flooded");
    }
}

struct Count;

impl Handler<u64> for Count {
    fn on_frame(&mut self, cx: &mut Context<'_, u64>, _: &[u8]) -> Outcome {
        *cx.app += 1;
        Ok(())
    }
}

/// With a rate for each connection: its burst, and no more, whatever has come meanwhile.
#[test]
fn a_turn_delivers_no_more_frames_than_the_bursts() {
    let mut server =
        Server::new(Config::new().with(|config| config.budgets.read_bytes = 1)).expect("server");
    let listen =
        local().with(|listen| listen.conn.frame_rate = Some(Rate::per_second(1000).burst(BURST)));
    server
        .listen(listen, |_: &mut u64, _| Count)
        .expect("listen");
    let addr = kit::net::tcp(&server.control().listeners()[0].addr);
    let floods: Vec<_> = (0..PLAYERS).map(|_| flood(addr, b"n")).collect();
    let (mut frames, mut busiest, begun) = (0, 0, Instant::now());
    while frames < 2000 {
        assert!(begun.elapsed() < PATIENCE, "only {frames} frames");
        let before = (frames, server.control().stats().traffic.bytes_in);
        server
            .poll_once(&mut frames, Some(Duration::from_millis(16)))
            .expect("a turn");
        let (delivered, read) = (
            frames - before.0,
            server.control().stats().traffic.bytes_in - before.1,
        );
        assert!(
            delivered <= PLAYERS as u64 * BURST,
            "{delivered} frames in one turn"
        );
        // One read each, and none at all where frames wait already.
        assert!(
            read <= PLAYERS as u64 * 64 * 1024,
            "{read} bytes in one turn"
        );
        busiest = busiest.max(delivered);
    }
    assert!(busiest > 1, "a turn delivers what it may");
    drop(server);
    stop(floods);
}

#[test]
fn the_game_goes_on_under_a_flood_and_says_how() {
    let mut command = Command::new(example("game"));
    let server = ChildProcess::start(command.args(["127.0.0.1:0", "1000000"]));
    let addr = server.address();
    let floods: Vec<_> = (0..PLAYERS).map(|_| flood(addr, b"e")).collect();
    // Beside them one plays, and the world moves on.
    let mut player = connect(addr);
    for _ in 0..3 {
        send2(&mut player, b"n");
    }
    let begun = Instant::now();
    loop {
        let seen = String::from_utf8(recv2(&mut player)).expect("text");
        let at = |x: i32| {
            seen.split(' ')
                .filter(|position| **position == format!("0,{x}"))
                .count()
        };
        if at(3) == 1 && seen.split(' ').count() == PLAYERS + 1 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{seen}");
    }
    server.signal("TERM");
    let (status, words, log) = server.finish();
    stop(floods);
    assert!(status.success(), "{log}");
    assert!(
        words.contains("frames, the latest was ") && words.contains("jitter: half within "),
        "{words}"
    );
    let last = words.lines().last().expect("a report");
    let numbers: Vec<u64> = last
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    let [moves, busiest] = numbers[..] else {
        panic!("{last}");
    };
    assert!(moves > 3 && busiest >= 1, "{last}");
    assert!(busiest <= (PLAYERS as u64 + 1) * BURST, "{last}");
}

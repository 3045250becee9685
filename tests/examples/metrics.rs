//! The metrics example serves what a scraper and a person ask for, under load and when the echo is full; and the text is right
//! to the letter. ranch: misc_metrics, misc_info.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use kit::exposition::Exposition;
use kit::net::{await_end, connect, eventually, ping, ChildProcess};
use portcullis::{Alarm, CloseReason, Config, ListenerState, Metrics, Quota, Server};

/// The example, the echo's address and the watchers'.
fn start(most: usize) -> (ChildProcess, SocketAddr, SocketAddr) {
    let mut command = Command::new(kit::net::example("metrics"));
    command.args(["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]);
    command.args(["--max-connections", &most.to_string()]);
    let child = ChildProcess::start(&mut command);
    let (echo, watch) = (child.address(), child.address());
    (child, echo, watch)
}

/// Status line, headers and body of one answer, until the end of the connection.
#[track_caller]
fn answer(stream: &mut impl Read) -> (String, Vec<String>, String) {
    let text = String::from_utf8(kit::net::read_to_end(stream)).expect("UTF-8");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
    let mut lines = head.split("\r\n").map(str::to_owned);
    (
        lines.next().expect("a status"),
        lines.collect(),
        body.to_owned(),
    )
}

/// GET over HTTP/1.1, as curl does it.
#[track_caller]
fn get(addr: SocketAddr, path: &str) -> (String, String) {
    let mut stream = connect(addr);
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\nUser-Agent: test\r\nAccept: */*\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("sent");
    let (status, headers, body) = answer(&mut stream);
    assert!(
        headers.contains(&format!("Content-Length: {}", body.len())),
        "{headers:?}"
    );
    assert!(headers.contains(&"Connection: close".to_owned()));
    assert!(headers.contains(&format!("Content-Type: {}", Metrics::CONTENT_TYPE)));
    (status, body)
}

#[track_caller]
fn scrape(addr: SocketAddr) -> Exposition {
    let (status, body) = get(addr, "/metrics");
    assert_eq!(status, "HTTP/1.1 200 OK");
    Exposition::read(&body)
}

/// Scraped again and again while sixteen clients come, echo and go: every text is right and the counters only grow.
#[test]
fn a_scraper_is_answered_under_load() {
    let (server, echo, watch) = start(1024);
    let done = AtomicBool::new(false);
    let rounds = thread::scope(|scope| {
        let clients: Vec<_> = (0..16)
            .map(|at| {
                let done = &done;
                scope.spawn(move || {
                    let mut rounds = 0_u64;
                    while !done.load(Ordering::Relaxed) {
                        let mut client = connect(echo);
                        for size in [1, 64, 1000 + at] {
                            ping(&mut client, &vec![7; size]);
                        }
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        let mut before = (0.0, 0.0, 0.0);
        for _ in 0..50 {
            let seen = scrape(watch);
            let now = (
                seen.get("portcullis_frames_in_total", &[]),
                seen.sum("portcullis_closed_total"),
                seen.get("portcullis_iterations_total", &[]),
            );
            assert!(
                now.0 >= before.0 && now.1 >= before.1 && now.2 > before.2,
                "{before:?} {now:?}"
            );
            before = now;
            // One moment: what is counted twice is the same twice.
            let open = seen.get("portcullis_connections", &[]);
            assert_eq!(seen.get("portcullis_accepted_total", &[]), open + now.1);
            assert_eq!(seen.get("portcullis_frame_in_bytes_count", &[]), now.0);
            assert_eq!(
                seen.get("portcullis_connection_age_seconds_count", &[]),
                now.1
            );
            assert_eq!(seen.sum("portcullis_listener_connections"), open);
        }
        done.store(true, Ordering::Relaxed);
        clients
            .into_iter()
            .map(|client| client.join().expect("served"))
            .sum::<u64>()
    });
    eventually("all have gone but the scraper", || {
        scrape(watch).get("portcullis_listener_connections", &[("listener", "echo")]) == 0.0
    });
    let seen = scrape(watch);
    assert_eq!(
        seen.get(
            "portcullis_listener_accepted_total",
            &[("listener", "echo")]
        ),
        rounds as f64
    );
    // The echo's frames, and the lines of the requests beside them.
    assert_eq!(
        seen.get("portcullis_frame_out_bytes_bucket", &[("le", "2")]),
        rounds as f64
    );
    assert!(seen.get("portcullis_frame_in_bytes_bucket", &[("le", "64")]) >= 2.0 * rounds as f64);
    drop(server);
}

/// Its places are its own: the echo is full, clients wait, and it answers, in all ways.
#[test]
fn it_answers_when_the_echo_is_full() {
    let (server, echo, watch) = start(3);
    let mut inside: Vec<_> = (0..3).map(|_| connect(echo)).collect();
    for client in &mut inside {
        ping(client, b"in");
    }
    let mut waits = connect(echo);
    waits
        .write_all(&kit::net::packet2(b"hello?"))
        .expect("sent");
    eventually("the echo is full", || {
        scrape(watch).get(
            "portcullis_listener_state",
            &[("listener", "echo"), ("state", "full")],
        ) == 1.0
    });
    let seen = scrape(watch);
    assert_eq!(
        seen.get("portcullis_listener_connections", &[("listener", "echo")]),
        3.0
    );
    assert_eq!(
        seen.get(
            "portcullis_listener_max_connections",
            &[("listener", "echo")]
        ),
        7.0,
        "the cap, of which four slots are reserved for the watchers"
    );
    assert_eq!(
        seen.get(
            "portcullis_listener_state",
            &[("listener", "metrics"), ("state", "listening")]
        ),
        1.0
    );
    assert_eq!(
        (
            seen.get("portcullis_connections", &[]),
            seen.get("portcullis_max_connections", &[])
        ),
        (4.0, 7.0)
    );

    let (_, tree) = get(watch, "/tree");
    assert!(tree.starts_with("server: 4 of 7 connections, "), "{tree}");
    assert!(
        tree.contains("\"echo\" on ") && tree.contains(": Full, 3 of 7 connections, 3 accepted\n"),
        "{tree}"
    );
    let peer = inside[2].local_addr().expect("an address");
    assert!(
        tree.contains(&format!(" from {peer}: Open, age ")),
        "{tree}"
    );

    drop(inside.remove(0));
    assert_eq!(kit::net::recv2(&mut waits), b"hello?");
    eventually("the close is told", || {
        get(watch, "/closes")
            .1
            .contains("1 frames out: peer finished\n")
    });
    drop(server);
}

/// Requests that are none, and those that are more than a request.
#[test]
fn odd_requests_are_answered_or_ended() {
    let (server, _, watch) = start(3);
    assert_eq!(get(watch, "/").0, "HTTP/1.1 404 Not Found");
    assert_eq!(get(watch, "/metrics/../tree").0, "HTTP/1.1 404 Not Found");
    // A client that finishes before it reads, one that says more than is asked, and one that sends byte by byte.
    let mut client = connect(watch);
    client
        .write_all(b"GET /tree HTTP/1.0\r\n\r\n")
        .expect("sent");
    client.shutdown(Shutdown::Write).expect("finish");
    assert_eq!(answer(&mut client).0, "HTTP/1.1 200 OK");
    let mut client = connect(watch);
    client
        .write_all(
            b"POST /tree HTTP/1.1\r\nContent-Length: 9\r\n\r\nwhatever\nGET /tree HTTP/1.1\r\n\r\n",
        )
        .expect("sent");
    assert_eq!(answer(&mut client).0, "HTTP/1.1 404 Not Found");
    let mut client = connect(watch);
    for byte in b"GET /tree HTTP/1.1\n\n" {
        client.write_all(&[*byte]).expect("sent");
    }
    assert_eq!(answer(&mut client).0, "HTTP/1.1 200 OK");
    // No end of headers, and a line without end.
    let floods = [
        (b"a: b\r\n".repeat(200), "handler failed: too many headers"),
        (vec![b'a'; 100_000], "frame too large"),
    ];
    for (flood, reason) in floods {
        let mut client = connect(watch);
        let _ = client.write_all(&flood);
        await_end(&mut client);
        // The client's end comes before the server's.
        eventually(reason, || get(watch, "/closes").1.contains(reason));
    }
    let seen = scrape(watch);
    assert_eq!(seen.get("portcullis_panics_total", &[]), 0.0);
    drop(server);
}

/// Everything that is measured is in the text, by any name of a listener.
#[test]
fn the_text_says_what_the_numbers_say() {
    let mut server: Server =
        Server::new(Config::max_connections(10).with(|config| config.memory_limit = Some(1 << 20)))
            .expect("server");
    let names = ["plain", "with \"quotes\" and a \\", "ключ"];
    for name in names {
        let service = |_: &mut (), _| kit::net::Echo;
        server
            .listen(kit::net::local().name(name), service)
            .expect("listen");
    }
    let addr = server.control().listeners()[1].addr.as_tcp().expect("TCP");
    let alarm = server
        .control()
        .on_alarm(
            Alarm::Connections(Quota::Count(1)),
            Duration::from_secs(5),
            |_, _, _| {},
        )
        .expect("a good alarm");
    server.control().suspend("ключ").expect("it is there");
    let mut clients = [connect(addr), connect(addr)];
    for (client, size) in clients.iter_mut().zip([300, 5]) {
        client
            .write_all(&kit::net::packet2(&vec![1; size]))
            .expect("sent");
    }
    let mut iterations = 0;
    while server.control().stats().traffic.frames_out < 2 {
        server
            .poll_once(&mut (), Some(Duration::from_secs(1)))
            .expect("a turn");
        iterations += 1;
        assert!(iterations < 1000, "{:?}", server.control().stats());
    }
    let metrics = server.control().metrics();
    let seen = Exposition::read(&metrics.to_string());
    for (at, name) in names.iter().enumerate() {
        let label = ("listener", *name);
        let accepted = if at == 1 { 2.0 } else { 0.0 };
        assert_eq!(
            seen.get("portcullis_listener_accepted_total", &[label]),
            accepted
        );
        let state = if at == 2 {
            ListenerState::Suspended
        } else {
            ListenerState::Listening
        };
        for other in [
            ListenerState::Listening,
            ListenerState::Full,
            ListenerState::Suspended,
        ] {
            let name = other.to_string();
            let labels = [label, ("state", name.as_str())];
            assert_eq!(
                seen.get("portcullis_listener_state", &labels),
                f64::from(u8::from(other == state))
            );
        }
    }
    let id = alarm.to_string();
    let labels = [("alarm", id.as_str()), ("kind", "connections")];
    assert_eq!(seen.get("portcullis_alarm_raised", &labels), 1.0);
    assert_eq!(seen.get("portcullis_alarm_value", &labels), 2.0);
    assert_eq!(seen.get("portcullis_alarm_threshold", &labels), 1.0);
    for &reason in CloseReason::ALL {
        assert_eq!(
            seen.get("portcullis_closed_total", &[("reason", reason.name())]),
            0.0
        );
    }
    assert_eq!(seen.get("portcullis_memory_limit_bytes", &[]), 1_048_576.0);
    assert_eq!(seen.get("portcullis_descriptors", &[]), 5.0);
    assert_eq!(seen.get("portcullis_frame_in_bytes_sum", &[]), 305.0);
    assert_eq!(
        seen.get("portcullis_frame_in_bytes_bucket", &[("le", "8")]),
        1.0
    );
    assert_eq!(
        seen.get("portcullis_frame_in_bytes_bucket", &[("le", "512")]),
        2.0
    );
    assert_eq!(
        seen.get("portcullis_bytes_out_total", &[]),
        metrics.stats.traffic.bytes_out as f64
    );
    assert_eq!(seen.get("portcullis_handshake_seconds_count", &[]), 0.0);
    // Numbers are whole: 2^9 microseconds, not 0.00051199999.
    assert!(metrics
        .to_string()
        .contains("portcullis_handshake_seconds_bucket{le=\"0.000512\"} 0\n"));
}

/// The reader itself sees what is wrong.
#[test]
fn the_reader_is_strict() {
    let good = "# HELP portcullis_a Words.\n# TYPE portcullis_a gauge\nportcullis_a{x=\"1\"} 1\n";
    Exposition::read(good);
    for (from, to) in [
        ("} 1\n", "} 1"),
        ("} 1\n", "} one\n"),
        ("} 1\n", "} -1\n"),
        ("} 1\n", "}  1\n"),
        ("} 1\n", "} 1\nportcullis_a{x=\"1\"} 2\n"),
        ("x=\"1\"", "x=\"\\t\""),
        ("x=\"1\"", "x=1"),
        ("gauge", "counter"),
        ("# HELP portcullis_a Words.\n", ""),
        ("portcullis_a{", "portcullis_b{"),
    ] {
        let bad = good.replacen(from, to, 1);
        let read = thread::spawn({
            let bad = bad.clone();
            move || Exposition::read(&bad)
        });
        assert!(read.join().is_err(), "{bad}");
    }
}

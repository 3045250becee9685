//! Each example does what its first lines say.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use kit::net::{await_end, connect, example, recv2, send2, ChildProcess};
use kit::ROOT;

/// The example on a port of its own.
fn start(name: &str, more: &[&str]) -> (ChildProcess, SocketAddr) {
    let child = ChildProcess::start(Command::new(example(name)).arg("127.0.0.1:0").args(more));
    let addr = child.address();
    (child, addr)
}

/// Ends it by SIGTERM, in order; its last words.
fn terminate(child: ChildProcess) -> String {
    child.signal("TERM");
    let (status, words, log) = child.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
    words
}

struct Line(BufReader<TcpStream>);

impl Line {
    fn connect(addr: SocketAddr) -> Self {
        Self(BufReader::new(connect(addr)))
    }

    fn say(&mut self, line: &str) {
        self.0.get_mut().write_all(line.as_bytes()).expect("sent");
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a line");
        line
    }

    /// A line of a server that has not closed.
    fn hear_more(&mut self) -> String {
        let line = self.hear();
        assert_ne!(line, "", "the server has closed");
        line
    }
}

#[test]
fn every_client_hears_what_one_says_in_the_chat() {
    let (server, addr) = start("chat", &[]);
    let mut members: Vec<Line> = Vec::new();
    for number in 1..=50 {
        let mut member = Line::connect(addr);
        assert_eq!(
            member.hear(),
            format!("* guest{number} has come, {number} are here\n")
        );
        for other in &mut members {
            other.hear();
        }
        members.push(member);
    }
    members[7].say("hello\n");
    for member in &mut members {
        assert_eq!(member.hear(), "guest8: hello\n");
    }
    drop(members.pop());
    for member in &mut members {
        assert_eq!(member.hear(), "* guest50 has gone (peer finished)\n");
    }
    drop(members);
    assert!(terminate(server).contains("0 evicted"));
}

/// More than the output limit at once, to members that read as fast as they can.
#[test]
fn a_long_text_that_is_pasted_evicts_no_member() {
    const LINES: usize = 2000;
    let (server, addr) = start("chat", &[]);
    let mut members: Vec<Line> = (0..5).map(|_| Line::connect(addr)).collect();
    // Who comes later misses what was said before.
    for member in &mut members {
        while !member.hear_more().contains("5 are here") {}
    }
    let text = format!("{}\n", "x".repeat(79)).repeat(LINES);
    let readers: Vec<_> = members
        .drain(1..)
        .map(|mut member| {
            std::thread::spawn(move || {
                let mut heard = 0;
                while heard < LINES {
                    heard += usize::from(member.hear_more().starts_with("guest1: x"));
                }
                member
            })
        })
        .collect();
    let mut talks = members.remove(0);
    talks.say(&text);
    for reader in readers {
        drop(reader.join().expect("every line"));
    }
    drop(talks);
    assert!(terminate(server).contains("0 evicted"));
}

/// One that does not read is thrown out when its share is full; the others lose nothing.
#[test]
fn the_chat_evicts_clients_that_do_not_read() {
    let (server, addr) = start("chat", &[]);
    let socket =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    socket.connect(&addr.into()).expect("connect");
    let mut deaf = TcpStream::from(socket);
    deaf.set_read_timeout(Some(kit::net::PATIENCE))
        .expect("timeout");
    let mut talks = Line::connect(addr);
    assert!(talks.hear().contains("guest2 has come"));
    let line = format!("{}\n", "x".repeat(1000));
    let mut lines = 0;
    loop {
        talks.say(&line);
        let heard = talks.hear();
        if heard.starts_with("* guest1 has gone") {
            break;
        }
        assert_eq!(heard, format!("guest2: {line}"));
        lines += 1;
        assert!(lines < 20_000, "it is never evicted");
    }
    assert!(lines > 60, "not before its share is full: {lines}");
    assert_eq!(talks.hear(), format!("guest2: {line}"), "nothing is lost");
    await_end(&mut deaf);
    drop(talks);
    assert!(terminate(server).contains("1 evicted"));
}

/// Players move, and see every player after each step; the frames go on whatever the players do.
#[test]
fn the_game_moves_sixty_times_a_second() {
    let (server, addr) = start("game", &["120"]);
    let mut players: Vec<_> = (0..3).map(|_| connect(addr)).collect();
    for step in [b"n", b"e", b"e"] {
        send2(&mut players[1], step);
    }
    send2(&mut players[1], b"jump");
    let mut answers = Vec::new();
    while !answers.contains(&b"?".to_vec()) || !answers.contains(&b"0,0 2,1 0,0".to_vec()) {
        answers.push(recv2(&mut players[1]));
        assert!(answers.len() < 120, "{answers:?}");
    }
    let (status, words, _) = server.finish();
    assert!(status.success());
    assert!(words.contains("120 frames, the latest was "), "{words}");
}

/// The loop's own timer and the network live side by side, and a signal ends both.
#[test]
fn the_foreign_loop_serves_and_keeps_its_own_time() {
    let (server, addr) = start("foreign_loop", &[]);
    let mut clients: Vec<Line> = (0..20).map(|_| Line::connect(addr)).collect();
    for client in &mut clients {
        client.say("time\n");
        assert_eq!(client.hear(), "0 s\n");
    }
    let mut seconds = String::new();
    while seconds != "1 s\n" {
        clients[0].say("time\n");
        seconds = clients[0].hear();
    }
    drop(clients);
    terminate(server);
}

/// Answers come in the order of the requests, to a peer that has finished sending too, and no
/// connection waits for another's work.
#[test]
fn the_worker_pool_answers_in_order() {
    let (server, addr) = start("worker_pool", &[]);
    let mut slow = Line::connect(addr);
    slow.say("300000\n10\n100\n");
    let mut quick = Line::connect(addr);
    quick.say("10\n");
    assert_eq!(quick.hear(), "4\n");
    slow.0
        .get_mut()
        .shutdown(std::net::Shutdown::Write)
        .expect("FIN");
    let heard: Vec<_> = (0..4).map(|_| slow.hear()).collect();
    assert_eq!(heard, ["25997\n", "4\n", "25\n", ""]);
    // One that leaves while its request is at work harms no other.
    let mut gone = Line::connect(addr);
    gone.say("300000\n");
    drop(gone);
    quick.say("no number\n");
    assert_eq!(quick.hear(), "");
    terminate(server);
}

/// More clients than threads: those at a thread are served by it, the others by the loop meanwhile.
#[test]
fn the_blocking_pool_serves_the_connections_of_the_loop() {
    let (server, addr) = start("blocking", &[]);
    let mut clients: Vec<Line> = (0..3).map(|_| Line::connect(addr)).collect();
    for (client, wanted) in clients.iter_mut().zip(["upper", "count", "upper"]) {
        client.say("what?\n");
        assert_eq!(client.hear(), "upper or count?\n");
        // The first line of the thread's part stands behind it already.
        client.say(&format!("{wanted}\nhello\n"));
        assert_eq!(client.hear(), "go on\n");
        assert_eq!(
            client.hear(),
            if wanted == "upper" { "HELLO\n" } else { "1\n" }
        );
    }
    let mut other = Line::connect(addr);
    other.say("what?\n");
    assert_eq!(other.hear(), "upper or count?\n");
    for client in &mut clients {
        client.say("again\n");
        assert!(["AGAIN\n", "2\n"].contains(&client.hear().as_str()));
        client
            .0
            .get_mut()
            .shutdown(std::net::Shutdown::Write)
            .expect("FIN");
        assert_eq!(client.hear(), "");
    }
    // A line has a limit.
    let mut endless = Line::connect(addr);
    endless.say("count\n");
    assert_eq!(endless.hear(), "go on\n");
    endless.say(&"x".repeat(100_000));
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut endless.0, &mut rest);
    assert!(rest.is_empty(), "it is not answered");
    drop((clients, other, endless));
    terminate(server);
}

#[test]
fn the_rpc_answers_each_request_by_its_number() {
    let (server, addr) = start("rpc", &[]);
    let mut client = connect(addr);
    let request = |number: u32, words: &str| {
        let body = [&number.to_be_bytes()[..], words.as_bytes()].concat();
        [&(body.len() as u32).to_be_bytes()[..], &body].concat()
    };
    // All under way at once.
    let all = [
        request(7, "set name ada"),
        request(8, "get name"),
        request(9, "get nothing"),
        request(10, "dance"),
        request(11, "count"),
    ];
    client.write_all(&all.concat()).expect("sent");
    for (number, words) in [
        (7, "done"),
        (8, "ada"),
        (9, "error: no such key"),
        (10, "error: unknown request"),
        (11, "5"),
    ] {
        let expected = request(number, words);
        let mut answer = vec![0; expected.len()];
        client.read_exact(&mut answer).expect("an answer");
        assert_eq!(answer, expected);
    }
    client.write_all(b"\0\0\0\x02no").expect("sent");
    await_end(&mut client);
    terminate(server);
}

/// Some test runs each example.
#[test]
fn every_example_is_tested() {
    let mut tests = String::new();
    for group in ["examples", "examples/mqtt", "examples/redis", "shards"] {
        for entry in std::fs::read_dir(format!("{ROOT}/tests/{group}")).expect("the tests") {
            let path = entry.expect("an entry").path();
            if path.is_file() {
                tests += &std::fs::read_to_string(path).expect("readable");
            }
        }
    }
    for entry in std::fs::read_dir(format!("{ROOT}/examples")).expect("the folder") {
        let path = entry.expect("an entry").path();
        let is_file = path.extension().is_some_and(|extension| extension == "rs");
        if is_file || path.join("main.rs").exists() {
            let name = path
                .file_stem()
                .and_then(|name| name.to_str())
                .expect("text");
            let calls = ["start", "run", "example"].map(|call| format!("{call}(\"{name}\""));
            let is_run = calls.iter().any(|call| tests.contains(call));
            assert!(is_run, "no test runs the example {name}");
        }
    }
}

/// Each example is in the README, says how to run it, and is short.
#[test]
fn every_example_is_short_and_says_how_it_is_run() {
    let folder = format!("{ROOT}/examples");
    let readme = std::fs::read_to_string(format!("{folder}/README.md")).expect("it is there");
    let mut looked = 0;
    for entry in std::fs::read_dir(&folder).expect("the folder") {
        let path = entry.expect("an entry").path();
        let (Some(name), Some("rs")) = (
            path.file_stem().and_then(|name| name.to_str()),
            path.extension().and_then(|extension| extension.to_str()),
        ) else {
            continue;
        };
        looked += 1;
        assert!(
            readme.contains(&format!("`{name}.rs`")),
            "examples/README.md does not name {name}"
        );
        let text = std::fs::read_to_string(&path).expect("readable");
        let head: Vec<_> = text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .collect();
        let is_command = |line: &&&str| {
            line.starts_with("//!     ") && line.contains(&format!("--example {name}"))
        };
        assert!(
            head.iter().any(|line| is_command(&line)),
            "{name} does not begin with its command"
        );
        let code = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with("//"));
        let code = code.count();
        let most = if name == "top" { 200 } else { 120 };
        assert!(
            code <= most || name == "echo_client", // It has to be thorough.
            "{name} has {code} lines of code"
        );
    }
    assert!(looked >= 15, "{looked} examples were found");
    // And the other way round: what is named there is there.
    for name in readme
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|name| name.ends_with(".rs") && !name.contains('/'))
    {
        let exists = [folder.clone(), format!("{folder}/support")]
            .iter()
            .any(|place| std::path::Path::new(place).join(name).exists());
        assert!(exists, "examples/README.md names {name}");
    }
}

/// Ctrl-C drains: a client that has finished is served, and the program ends in order.
#[test]
fn every_server_drains_on_sigint() {
    let listen: &[&str] = &["--listen", "127.0.0.1:0"];
    let at: &[&str] = &["127.0.0.1:0"];
    for (name, arguments) in [
        ("activation", at),
        ("blocking", at),
        ("chat", at),
        ("echo", listen),
        ("foreign_loop", at),
        ("game", at),
        ("handover", at),
        (
            "metrics",
            &["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"],
        ),
        ("mqtt", listen),
        ("redis", listen),
        ("rpc", at),
        ("service", listen),
        ("shards", at),
        ("websocket", listen),
        ("worker_pool", at),
    ] {
        let child = ChildProcess::start(Command::new(example(name)).args(arguments));
        let client = connect(child.address());
        drop(client);
        child.signal("INT");
        let (status, _, log) = child.finish();
        assert!(status.success(), "{name}: {status}, {log}");
        assert!(!log.contains("panicked"), "{name}: {log}");
    }
}

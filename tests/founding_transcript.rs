//! The founding transcript, with real Erlang: echo, see the connection, kill it, read the report, go on serving.

use std::io::Write;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Mutex;

use kit::net::{
    connect, eventually, have, local, ping, read_to_end, spawn, tcp, ChildProcess, Echo, Running,
};
use portcullis::{CloseReason, Config, ConnId, Observer, Server};

/// Keeps the server's warnings: what an operator sees.
struct Reports(Mutex<Vec<String>>);

static REPORTS: Reports = Reports(Mutex::new(Vec::new()));

impl log::Log for Reports {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            self.0.lock().expect("lock").push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// What the README of the original has one type into the shell, until the connection ends.
const TRANSCRIPT: &str = r#"
    [Port] = init:get_plain_arguments(),
    {ok, S} = gen_tcp:connect({127,0,0,1}, list_to_integer(Port), [{packet,2}]),
    {ok, {_, Ours}} = inet:sockname(S),
    ok = gen_tcp:send(S, <<"hello">>),
    receive {tcp, S, "hello"} -> io:format("echoed to ~b~n", [Ours])
    after 30000 -> io:format("no echo~n"), halt(1) end,
    receive {tcp_closed, S} -> io:format("closed~n"), halt(0);
            Other -> io:format("unexpected ~p~n", [Other]), halt(1)
    after 60000 -> io:format("still open~n"), halt(1) end.
"#;

/// One session of the first server: echo, list, kill one, read the report, echo on. Twice: the observer's page kills as the handle
/// does.
#[test]
fn echo_kill_report_and_the_others_live() {
    // Any argument but this one starts a shell that does not end.
    if !have("erl", "-version") {
        return;
    }
    log::set_logger(&REPORTS).expect("the only logger");
    log::set_max_level(log::LevelFilter::Warn);

    let server = spawn(|| {
        let mut server = Server::new(Config::new()).expect("server");
        let echo = |_: &mut (), _| Echo;
        server.listen(local(), echo).expect("listen");
        let observer = Observer::new().allow_kill(TOKEN);
        let listen = observer.listen("127.0.0.1:0").expect("loopback");
        server.listen_with(listen, observer).expect("listen");
        (server, ())
    });
    let page = tcp(&server.listeners[1].addr);
    let mut bystander = connect(server.addr());
    ping(&mut bystander, b"before");
    session(&server, 1, |id| server.handle.kill(id).expect("it lives"));
    session(&server, 2, |id| kill_by_page(page, id));

    // The other connections are not disturbed, and new clients are served.
    ping(&mut bystander, b"after");
    ping(&mut connect(server.addr()), b"newcomer");
}

const TOKEN: &str = "0123456789abcdef";

/// Kills a connection as the page does.
fn kill_by_page(page: SocketAddr, id: ConnId) {
    let mut browser = connect(page);
    let text = format!("{id:#}");
    let request = format!(
        "POST /kill HTTP/1.1\r\nHost: {page}\r\nOrigin: http://{page}\r\nAuthorization: Bearer {TOKEN}\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    );
    browser.write_all(request.as_bytes()).expect("sent");
    let answer = read_to_end(&mut browser);
    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"), "{answer:?}");
}

/// Erlang's session, whose connection is the `number`th that is killed.
fn session(server: &Running, number: usize, kill: impl FnOnce(ConnId)) {
    let port = server.addr().port().to_string();
    let mut command = Command::new("erl");
    command.args(["-noshell", "-noinput", "-eval", TRANSCRIPT, "-extra", &port]);
    let erlang = ChildProcess::start(&mut command);
    let line = erlang.line();
    let from = line
        .strip_prefix("echoed to ")
        .unwrap_or_else(|| panic!("{line}"));
    let from: u16 = from.parse().expect("a port");

    // The connections can be seen at run time, and told apart.
    let seen = server.ask(|(), control| control.connections());
    assert_eq!(seen.len(), 2);
    let theirs = seen
        .iter()
        .find(|info| info.peer.port() == Some(from))
        .expect("in the list");
    assert_eq!((theirs.traffic.frames_in, theirs.traffic.bytes_in), (1, 7));
    let id = theirs.id;
    assert_eq!(REPORTS.0.lock().expect("lock").len(), number - 1);
    kill(id);

    assert_eq!(erlang.line(), "closed");
    let (status, output, log) = erlang.finish();
    assert!(status.success(), "{output} {log}");
    let stats = server.until("it is counted", |stats| {
        stats.closed(CloseReason::Killed) == number as u64 && stats.open == 1
    });
    assert_eq!(stats.open, 1);
    assert!(!server.handle.is_live(id));
    eventually("there is a report", || {
        REPORTS.0.lock().expect("lock").len() >= number
    });
    let reports = REPORTS.0.lock().expect("lock").clone();
    assert_eq!(reports.len(), number, "{reports:?}");
    let report = &reports[number - 1];
    // A supervisor's report has context, offender, peer, state and age.
    let peer = format!("from 127.0.0.1:{from}");
    for part in [
        "killed",
        &id.to_string(),
        "L0",
        &peer,
        "Open",
        "age ",
        "7 bytes and 1 frames in",
    ] {
        assert!(report.contains(part), "{part}: {report}");
    }
}

/// The same words to the example, as a newcomer would try it.
#[test]
fn the_example_answers_erlang() {
    if !have("erl", "-version") {
        return;
    }
    let (server, addr) = ChildProcess::echo(&["--idle-timeout", "1"]);
    let port = addr.port().to_string();
    let mut command = Command::new("erl");
    command.args(["-noshell", "-noinput", "-eval", TRANSCRIPT, "-extra", &port]);
    let erlang = ChildProcess::start(&mut command);
    assert!(erlang.line().starts_with("echoed to "));
    // The idle timeout ends it in order, and Erlang hears of it.
    assert_eq!(erlang.line(), "closed");
    assert!(erlang.finish().0.success());
    server.signal("TERM");
    let (status, output, log) = server.finish();
    assert!(status.success(), "{log}");
    assert!(
        output.contains("1 accepted ") && output.contains("closed: 1 idle timeout"),
        "{output}"
    );
}

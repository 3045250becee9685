//! The observer over TLS, at a Unix socket and in shards, as curl sees it.

use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use kit::exposition::Exposition;
use kit::net::{connect, eventually, have, local, ping, spawn, tcp, Echo, Place, Running};
#[cfg(feature = "tls")]
use kit::tls::{Site, NAME};
use portcullis::{Config, Listen, Observer, Server, Shards};
use serde_json::Value;

/// The answer's status and content.
fn curl(options: &[&str], url: &str) -> (String, String) {
    let mut command = Command::new("curl");
    command.args([
        "--silent",
        "--show-error",
        "--max-time",
        "30",
        "--noproxy",
        "*",
    ]);
    command.args(["--write-out", "\n%{http_code} %{num_connects}"]);
    let output = command.args(options).arg(url).output().expect("curl runs");
    let failure = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{url}: {failure}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let (content, code) = text.rsplit_once('\n').expect("a line of curl's");
    (code.to_owned(), content.to_owned())
}

/// The events up to the second snapshot.
fn events(options: &[&str], url: &str) -> String {
    let mut command = Command::new("curl");
    command.args([
        "--silent",
        "--no-buffer",
        "--max-time",
        "60",
        "--noproxy",
        "*",
    ]);
    command.args(options).arg(url).stdout(Stdio::piped());
    let mut curl = command.spawn().expect("curl runs");
    let (mut output, mut text) = (curl.stdout.take().expect("piped"), Vec::new());
    let is_second = |text: &[u8]| {
        text.windows(15)
            .filter(|part| part == b"event: snapshot")
            .count()
            > 1
    };
    while !(is_second(&text) && text.ends_with(b"\n\n")) {
        let mut piece = [0; 65536];
        let length = output.read(&mut piece).expect("a pipe");
        assert!(
            length > 0,
            "curl has ended: {}",
            String::from_utf8_lossy(&text)
        );
        text.extend_from_slice(&piece[..length]);
    }
    let _ = curl.kill();
    curl.wait().expect("it ends");
    String::from_utf8(text).expect("UTF-8")
}

/// Each path over one transport.
fn visit(options: &[&str], base: &str) {
    for (path, part) in [
        ("/", "<!doctype html>"),
        ("/healthz", "ok\n"),
        ("/metrics", "portcullis_max_connections 1024\n"),
        ("/tree.json", "\"draining\":false"),
    ] {
        let (code, content) = curl(options, &format!("{base}{path}"));
        assert_eq!(code, "200 1", "{base}{path}");
        let content = content.to_ascii_lowercase();
        assert!(content.contains(part), "{base}{path}: {content:.300}");
    }
    // Both over one connection.
    let (code, _) = curl(
        &[options, &[&format!("{base}/healthz")]].concat(),
        &format!("{base}/"),
    );
    assert_eq!(code, "200 0");
    let text = events(options, &format!("{base}/events"));
    for (event, least) in [("history", 1), ("snapshot", 2), ("connections", 1)] {
        let count = text.matches(&format!("event: {event}\n")).count();
        assert!(count >= least, "{count} of {event} in {text:.300}");
    }
}

fn server(observe: impl FnOnce(&mut Server, Observer) + Send + 'static) -> Running {
    spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        server
            .listen(local(), |_: &mut (), _| Echo)
            .expect("listen");
        observe(&mut server, Observer::new());
        (server, ())
    })
}

#[cfg(feature = "tls")]
#[test]
fn it_is_served_over_tls() {
    if !have("curl", "--version") {
        return;
    }
    let (site, place) = (Site::new(), Place::new());
    let config = site.server();
    let running = server(move |server, observer| {
        let observer = observer.allow_host(NAME);
        let listen = observer.listen("127.0.0.1:0").expect("loopback");
        server
            .listen_with(listen.tls(config), observer)
            .expect("listen");
    });
    let port = tcp(&running.listeners[1].addr).port();
    let authority = place.path("authority.pem");
    std::fs::write(&authority, site.authority.certificate.pem()).expect("written");
    let resolve = format!("{NAME}:{port}:127.0.0.1");
    let authority = authority.to_str().expect("UTF-8");
    let options = ["--cacert", authority, "--resolve", &resolve];
    visit(&options, &format!("https://{NAME}:{port}"));
    // Without its name: the certificate is not checked, the host is loopback.
    visit(&["--insecure"], &format!("https://127.0.0.1:{port}"));
    let (stats, ()) = running.finish();
    assert_eq!(stats.panics, 0);
}

#[test]
fn it_is_served_at_a_unix_socket() {
    if !have("curl", "--version") {
        return;
    }
    let place = Place::new();
    let path = place.path("observer.sock");
    let at = path.clone();
    let running = server(move |server, observer| {
        let options = observer.listen("127.0.0.1:0").expect("loopback");
        let mut listen = Listen::unix(&at, options.framing);
        (listen.conn, listen.reserved) = (options.conn, options.reserved);
        listen.max_connections = options.max_connections;
        listen.evict_silent = options.evict_silent;
        listen.socket.mode = Some(0o600);
        server.listen_with(listen, observer).expect("listen");
    });
    let socket = path.to_str().expect("UTF-8");
    visit(&["--unix-socket", socket], "http://localhost");
    let options = ["--unix-socket", socket];
    assert_eq!(curl(&options, "http://evil.example/").0, "421 1");
    running.finish();
    assert!(!Path::new(socket).exists());
}

/// Each shard has a port, and shows itself.
#[test]
fn each_shard_shows_itself() {
    if !have("curl", "--version") {
        return;
    }
    const COUNT: usize = 3;
    let shards = Shards::new(Config::new())
        .threads(COUNT)
        .spawn(|shard, server: &mut Server| {
            server.listen(local().name("echo"), |_: &mut (), _| Echo)?;
            let observer = Observer::new();
            let listen = observer.listen("127.0.0.1:0")?;
            server.listen_with(listen.name(format!("observer {shard}")), observer)?;
            Ok(())
        })
        .expect("shards");
    let addr = |name: &str| -> SocketAddr {
        let mut all = shards.listeners.iter();
        tcp(&all.find(|one| one.name == name).expect("it listens").addr)
    };
    let mut clients: Vec<_> = (0..30).map(|_| connect(addr("echo"))).collect();
    for client in &mut clients {
        ping(client, b"hello");
    }
    let mut sum = 0.0;
    for shard in 0..COUNT {
        let base = format!("http://{}", addr(&format!("observer {shard}")));
        visit(&[], &base);
        let text = events(&[], &format!("{base}/events"));
        let (_, data) = text.split_once("event: snapshot\ndata: ").expect("one");
        let line = data.lines().next().expect("a line");
        let snapshot: Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(
            (&snapshot["shard"], &snapshot["shards"]),
            (&shard.into(), &COUNT.into())
        );
        let seen = Exposition::read(&curl(&[], &format!("{base}/metrics")).1);
        let labels = [("listener", "echo")];
        sum += seen.get("portcullis_listener_frames_in_total", &labels);
    }
    assert_eq!(sum, 30.0);
    let metrics = shards
        .handle
        .metrics(Duration::from_secs(30))
        .expect("answers");
    let echo = metrics.listeners.iter().find(|one| one.name == "echo");
    assert_eq!(echo.expect("one for all").traffic.frames_in, 30);
    shards.handle.drain(Duration::ZERO).expect("they run");
    eventually("the shards end", || shards.is_finished());
    shards.join().expect("no error");
}

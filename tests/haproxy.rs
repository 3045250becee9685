//! Behind a real haproxy: its headers are understood, its health checks pass without noise, and two instances are
//! restarted one after the other without a lost request.
#![cfg(all(feature = "tls", target_os = "linux"))]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, Once};

use kit::net::{
    connect, eventually, have, local, packet2, ping, read_to_end, recv2, send2, spawn,
    while_asking, ChildProcess, Running,
};
use kit::tls::{exchange, handshake_over, session, Authority, Folder, Site};
use portcullis::tls::rustls::version;
use portcullis::{
    AccessRules, Config, Context, Framing, Handler, Listen, Outcome, Peer, ProxyHeader,
    ProxyProtocol, Server,
};
use socket2::SockRef;

/// A haproxy of this test's own.
struct Haproxy {
    _child: ChildProcess,
    folder: Folder,
    addr: SocketAddr,
}

impl Haproxy {
    /// With this behind the `bind` of its one frontend, and these lines for frontend and backend.
    fn start(folder: Folder, bind: &str, frontend: &str, backend: &str) -> Self {
        // The listening socket is made here, so that no port is guessed.
        let listening = TcpListener::bind("127.0.0.1:0").expect("a port");
        SockRef::from(&listening)
            .set_cloexec(false)
            .expect("inherited");
        let config = format!(
            "global\n  stats socket {}/admin mode 600 level admin\n\
             defaults\n  mode tcp\n  timeout connect 10s\n  timeout client 30s\n  timeout server 30s\n  retries 10\n\
             frontend front\n  bind fd@{} {bind}\n{frontend}  default_backend back\n\
             backend back\n  option redispatch\n{backend}",
            folder.path().display(),
            listening.as_raw_fd(),
        );
        let file = folder.file("haproxy.cfg", config);
        let child = ChildProcess::start(Command::new("haproxy").arg("-db").arg("-f").arg(file));
        let haproxy = Self {
            _child: child,
            addr: listening.local_addr().expect("an address"),
            folder,
        };
        eventually("haproxy answers", || haproxy.try_ask("show info").is_some());
        haproxy
    }

    fn try_ask(&self, command: &str) -> Option<String> {
        let mut admin = UnixStream::connect(self.folder.path().join("admin")).ok()?;
        admin.set_read_timeout(Some(kit::net::PATIENCE)).ok()?;
        writeln!(admin, "{command}").ok()?;
        let mut answer = String::new();
        admin.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    fn ask(&self, command: &str) -> String {
        self.try_ask(command).expect("haproxy answers")
    }

    /// What `show stat` says of a server, by the name of the column.
    fn stat(&self, server: &str, column: &str) -> String {
        let all = self.ask("show stat");
        let mut lines = all.lines();
        let names: Vec<_> = lines
            .next()
            .expect("a line")
            .trim_start_matches("# ")
            .split(',')
            .collect();
        let at = names
            .iter()
            .position(|name| *name == column)
            .expect("a column");
        let prefix = format!("back,{server},");
        let line = lines
            .find(|line| line.starts_with(&prefix))
            .expect("the server");
        line.split(',').nth(at).expect("a value").to_owned()
    }
}

/// What handlers have heard of those behind the proxy.
type Heard = Vec<String>;

/// Keeps the facts of its header.
struct Recorder {
    _header: Option<Rc<ProxyHeader>>,
}

impl Handler<Heard> for Recorder {
    fn on_frame(&mut self, cx: &mut Context<'_, Heard>, frame: &[u8]) -> Outcome {
        let header = cx.conn.proxy().expect("a header");
        let (tlvs, ssl) = (&header.tlvs, header.tlvs.ssl());
        let origin = match (&header.source, &header.destination) {
            (Some(source), Some(destination)) => format!("{source} to {destination}"),
            other => format!("{other:?}"),
        };
        let mut told = format!("v{} {origin}", header.version);
        if let Some(id) = tlvs.get(0x05) {
            told += &format!(" id {}", String::from_utf8_lossy(id));
        }
        if let Some(name) = tlvs.get(0x02).map(String::from_utf8_lossy) {
            told += &format!(" authority {name}");
        }
        if let Some(alpn) = tlvs.get(0x01) {
            told += &format!(" alpn {}", String::from_utf8_lossy(alpn));
        }
        if let Some(ssl) = ssl {
            told += &format!(
                " tls {} verified {} version {:?} name {:?} cipher {}",
                ssl.is_tls(),
                ssl.is_verified(),
                ssl.get(0x21),
                ssl.get(0x22),
                ssl.get(0x23).is_some()
            );
        }
        cx.app.push(told);
        cx.conn.send(frame)?;
        Ok(())
    }
}

fn behind(mut listen: Listen) -> Running<Heard> {
    spawn(move || {
        let mut server = Server::new(Config::new()).expect("server");
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(
            AccessRules::deny_all()
                .allow("127.0.0.1")
                .expect("an address"),
        );
        server
            .listen(listen, |_: &mut Heard, peer: Peer| Recorder {
                _header: peer.proxy,
            })
            .expect("listen");
        (server, Heard::new())
    })
}

fn last_heard(server: &Running<Heard>) -> String {
    server
        .ask(|heard, _| heard.pop())
        .expect("somebody was served")
}

/// `send-proxy`, `send-proxy-v2` and health checks of a real haproxy.
#[test]
fn its_headers_are_understood() {
    if !have("haproxy", "-v") {
        return;
    }
    for (options, version, tail) in [
        ("send-proxy", 1, ""),
        ("send-proxy-v2", 2, ""),
        (
            "send-proxy-v2 proxy-v2-options crc32c,unique-id",
            2,
            " id abc-",
        ),
    ] {
        let server = behind(local());
        let backend = format!("  server one {} {options}\n", server.addr());
        let frontend = "  unique-id-format abc-%pid\n";
        let haproxy = Haproxy::start(Folder::new(), "", frontend, &backend);
        let mut client = connect(haproxy.addr);
        ping(&mut client, b"hello");
        let own = client.local_addr().expect("an address");
        let told = last_heard(&server);
        assert!(
            told.starts_with(&format!("v{version} {own} to {}{tail}", haproxy.addr)),
            "{told}"
        );
        // Large, both ways, half-closed: as without a proxy.
        let large = vec![b'x'; 60_000];
        send2(&mut client, &large);
        client.shutdown(Shutdown::Write).expect("FIN");
        assert!(recv2(&mut client) == large);
        assert_eq!(read_to_end(&mut client), b"");
    }
}

/// What comes to haproxy through a Unix socket has paths instead of addresses. esockd rejects such a header.
#[test]
fn a_unix_socket_in_front_is_understood() {
    if !have("haproxy", "-v") {
        return;
    }
    let server = behind(local());
    let folder = Folder::new();
    let path = folder.path().join("front");
    let frontend = format!("  bind unix@{}\n", path.display());
    let backend = format!("  server one {} send-proxy-v2\n", server.addr());
    let _haproxy = Haproxy::start(folder, "", &frontend, &backend);
    let mut client = UnixStream::connect(&path).expect("connect");
    client
        .set_read_timeout(Some(kit::net::PATIENCE))
        .expect("timeout");
    ping(&mut client, b"hello");
    let told = last_heard(&server);
    assert!(
        told.starts_with("v2 unix:") || told.starts_with("v2 (None"),
        "{told}"
    );
}

/// TLS ends at haproxy: TLVs describe the client.
#[test]
fn it_tells_of_the_tls_that_it_ended() {
    if !have("haproxy", "-v") {
        return;
    }
    let site = Site::new();
    let clients = Authority::new("clients");
    let (folder, identity) = (Folder::new(), &site.identity);
    let pem = folder.file(
        "site.pem",
        format!("{}{}", identity.chain_pem, identity.key_pem),
    );
    let roots = folder.file("clients.pem", clients.certificate.pem());
    let bind = format!(
        "ssl crt {} ca-file {} verify optional alpn mqtt",
        pem.display(),
        roots.display()
    );
    let server = behind(local());
    let backend = format!(
        "  server one {} send-proxy-v2-ssl-cn proxy-v2-options ssl,cert-cn,ssl-cipher,authority,crc32c\n",
        server.addr()
    );
    let haproxy = Haproxy::start(folder, &bind, "", &backend);
    for (config, verified, name) in [
        (site.client(&version::TLS13), false, "None"),
        (
            site.client_with(&version::TLS13, &clients.client("device-7")),
            true,
            "Some(\"device-7\")",
        ),
    ] {
        let tls = handshake_over(connect(haproxy.addr), session(&config)).expect("a handshake");
        assert_eq!(exchange(tls, &packet2(b"hello")), packet2(b"hello"));
        let told = last_heard(&server);
        let expected = format!(
            "authority server.test tls true verified {verified} version Some(\"TLSv1.3\") name {name} cipher true"
        );
        assert!(told.ends_with(&expected), "{told}");
    }
}

static LOUD: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Notes what is said above debug.
struct Ears;

impl log::Log for Ears {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Info
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let words = record.args().to_string();
            LOUD.lock().expect("not poisoned").push(words);
        }
    }

    fn flush(&self) {}
}

fn listen_for_noise() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Ears).expect("the only one");
        log::set_max_level(log::LevelFilter::Trace);
    });
}

/// Health checks say LOCAL, or nothing at all: the server stays UP, no handler is called, and no
/// line is logged. esockd #9, #10, #11.
#[test]
fn health_checks_pass_and_make_no_noise() {
    if !have("haproxy", "-v") {
        return;
    }
    listen_for_noise();
    for (options, header) in [
        ("send-proxy-v2 check inter 20ms", true),
        ("send-proxy check inter 20ms", true),
        // A port of its own for the checks makes haproxy leave the header out.
        ("send-proxy-v2 check port PORT inter 20ms", false),
    ] {
        let server = behind(local().name(format!("checked {options}")));
        let port = server.addr().port().to_string();
        let backend = format!(
            "  server one {} {}\n",
            server.addr(),
            options.replace("PORT", &port)
        );
        let haproxy = Haproxy::start(Folder::new(), "", "", &backend);
        if header {
            server.until("it has been checked", |stats| stats.closed_total() >= 20);
        } else {
            // Such a check is reset before TCP's handshake is done: there is no connection to
            // accept.
            eventually("it has been checked", || {
                haproxy.stat("one", "check_status") == "L4OK"
            });
        }
        assert_eq!(haproxy.stat("one", "status"), "UP", "{options}");
        assert_eq!(haproxy.stat("one", "chkfail"), "0", "{options}");
        let stats = server.handle.stats();
        assert_eq!(
            stats.opened > 0,
            header,
            "LOCAL is a connection like any other: {stats:?}"
        );
        assert!(
            server.ask(|heard, _| heard.is_empty()),
            "no frame came of it"
        );
        let mut client = connect(haproxy.addr);
        ping(&mut client, b"hello");
        drop((client, haproxy));
        server.until("nothing is left behind", |stats| stats.open == 0);
        drop(server);
    }
    let loud = LOUD.lock().expect("not poisoned");
    let noise: Vec<_> = loud
        .iter()
        .filter(|line| line.contains("check") && !line.starts_with("listener "))
        .collect();
    assert!(noise.is_empty(), "{noise:?}");
    let warnings = loud
        .iter()
        .filter(|line| !line.starts_with("listener ") && !line.contains("drain"));
    assert_eq!(warnings.count(), 0, "{loud:?}");
}

/// One request is one connection, as short-lived clients make them.
fn request(addr: SocketAddr, number: usize) -> Result<(), String> {
    let payload = format!("request {number}");
    let attempt = || -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(kit::net::PATIENCE))?;
        stream.write_all(&packet2(payload.as_bytes()))?;
        let mut answer = vec![0; payload.len() + 2];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    };
    match attempt() {
        Ok(answer) if answer == packet2(payload.as_bytes()) => Ok(()),
        Ok(answer) => Err(format!("{payload}: a wrong answer: {answer:?}")),
        Err(error) => Err(format!("{payload}: {error}")),
    }
}

/// Two instances, each taken out of the rotation, drained by SIGTERM, replaced, and put back: at least a thousand requests
/// meanwhile for each restart, and none of them fails.
#[test]
fn a_rolling_restart_loses_no_request() {
    if !have("haproxy", "-v") {
        return;
    }
    let options = ["--proxy-protocol", "--trusted-proxy", "127.0.0.1"];
    let instance = |addr: &str| {
        let mut command = Command::new(kit::net::example("echo"));
        let child = ChildProcess::start(command.args(["--listen", addr]).args(options));
        let addr = child.address();
        (child, addr)
    };
    let mut instances: Vec<_> = (0..2).map(|_| instance("127.0.0.1:0")).collect();
    let backend: String = instances
        .iter()
        .enumerate()
        .map(|(number, (_, addr))| {
            format!("  server s{number} {addr} send-proxy-v2 check inter 20ms rise 1 fall 2\n")
        })
        .collect();
    let haproxy = Haproxy::start(Folder::new(), "", "  maxconn 500\n", &backend);
    for number in 0..2 {
        eventually("it is up", || {
            haproxy.stat(&format!("s{number}"), "status") == "UP"
        });
    }
    let done = while_asking(
        |number| request(haproxy.addr, number),
        |done| {
            for round in 0..4 {
                let before = done.load(Ordering::Relaxed);
                let number = round % 2;
                let name = format!("s{number}");
                haproxy.ask(&format!("set server back/{name} state drain"));
                eventually("it has no connection", || {
                    haproxy.stat(&name, "scur") == "0"
                });
                let (child, addr) = instances.swap_remove(number);
                child.signal("TERM");
                let (status, words, log) = child.finish();
                assert!(status.success(), "{log}");
                assert!(words.contains(" 0 were forced"), "{words}");
                instances.insert(number, instance(&addr.to_string()));
                haproxy.ask(&format!("set server back/{name} state ready"));
                eventually("it is up again", || haproxy.stat(&name, "status") == "UP");
                eventually("a thousand requests per restart", || {
                    done.load(Ordering::Relaxed) >= before + 1000
                });
            }
        },
    );
    assert!(done >= 4000);
}

/// The framing does not matter to it.
#[test]
fn lines_come_through_as_well() {
    if !have("haproxy", "-v") {
        return;
    }
    let server = behind(local().with(|listen| listen.framing = Framing::Line));
    let backend = format!("  server one {} send-proxy\n", server.addr());
    let haproxy = Haproxy::start(Folder::new(), "", "", &backend);
    let mut client = connect(haproxy.addr);
    client.write_all(b"one\ntwo\n").expect("sent");
    client.shutdown(Shutdown::Write).expect("FIN");
    assert_eq!(read_to_end(&mut client), b"one\ntwo\n");
}

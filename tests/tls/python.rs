//! Python's `ssl` module is served over TLS 1.2 and 1.3, and hears goodbye as it expects.
#![cfg(feature = "tls")]

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use kit::net::{have, local, ChildProcess, Running, PATIENCE};
use kit::tls::{spawn_recorder, Authority, Folder, Seen, Site, NAME};
use portcullis::tls::rustls::{ProtocolVersion, ServerConfig};
use portcullis::{CloseReason, Config, Listen};

const VERSIONS: [(&str, ProtocolVersion); 2] = [
    ("TLSv1_2", ProtocolVersion::TLSv1_2),
    ("TLSv1_3", ProtocolVersion::TLSv1_3),
];

/// What every script begins with: arguments, and frames of packet-2.
const PRELUDE: &str = r#"
import socket, ssl, struct, sys
port, name, version, patience = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
context = ssl.create_default_context(cafile="ca.pem")
context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
# What is silently taken for an end by default is an error here: FIN without close_notify.
def connect(session=None):
    tcp = socket.create_connection(("127.0.0.1", port), timeout=patience)
    return context.wrap_socket(tcp, server_hostname=name, suppress_ragged_eofs=False, session=session)
def send(tls, payload):
    tls.sendall(struct.pack(">H", len(payload)) + payload)
def exactly(tls, count):
    data = b""
    while len(data) < count:
        piece = tls.recv(count - len(data))
        assert piece, "ended early"
        data += piece
    return data
def receive(tls):
    return exactly(tls, struct.unpack(">H", exactly(tls, 2))[0])
"#;

fn serve(config: ServerConfig, change: impl FnOnce(&mut Listen)) -> Running<Seen> {
    spawn_recorder(Config::new(), local().tls(Arc::new(config)).with(change))
}

/// Runs a script to its end, which must be a good one.
#[track_caller]
fn run(folder: &Folder, server: &Running<Seen>, version: &str, script: &str) {
    let mut command = Command::new("python3");
    command
        .current_dir(folder.path())
        .args(["-c", &format!("{PRELUDE}{script}")])
        .args([&server.addr().port().to_string(), NAME, version])
        .arg(PATIENCE.as_secs().to_string());
    let (status, out, err) = ChildProcess::start(&mut command).finish();
    assert!(status.success(), "{version}: {out}{err}");
}

fn desk() -> Option<(Site, Folder)> {
    if !have("python3", "--version") {
        return None;
    }
    let (site, folder) = (Site::new(), Folder::new());
    folder.file("ca.pem", site.authority.certificate.pem());
    Some((site, folder))
}

/// `unwrap` sends close_notify and waits for ours; the TCP connection below it then ends with FIN.
#[test]
fn frames_echo_and_unwrap_works() {
    let Some((site, folder)) = desk() else { return };
    for (name, version) in VERSIONS {
        let server = serve(site.server(), |_| ());
        run(
            &folder,
            &server,
            name,
            r#"
tls = connect()
for payload in [b"hello", b"", b"x" * 65535, b"last"]:
    send(tls, payload)
    assert receive(tls) == payload
tcp = tls.unwrap()
assert tcp.recv(1) == b""
tcp.close()
"#,
        );
        let (stats, seen) = server.finish();
        assert_eq!((stats.traffic.frames_in, stats.traffic.frames_out), (4, 4));
        assert_eq!(seen.agreed[0].version, Some(version));
        assert_eq!(seen.closed, [(CloseReason::Finished, String::new())]);
    }
}

/// Megabytes both ways at once, in one thread: an SSL object of Python's is not to be used in two.
#[test]
fn megabytes_pass() {
    let Some((site, folder)) = desk() else { return };
    for (name, _) in VERSIONS {
        let server = serve(site.server(), |_| ());
        run(
            &folder,
            &server,
            name,
            r#"
import select
tls = connect()
tls.setblocking(False)
wire = b"".join(struct.pack(">H", n) + bytes([n % 256]) * n for n in (i * 37 % 65536 for i in range(100)))
wire *= 3
sent, answer = 0, bytearray()
while len(answer) < len(wire):
    progress = False
    if sent < len(wire):
        try:
            sent += tls.send(wire[sent:sent + 16384])
            progress = True
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
    try:
        answer += tls.recv(16384)
        progress = True
    except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
        pass
    if not progress:
        readable, writable, _ = select.select([tls], [tls] if sent < len(wire) else [], [], patience)
        assert readable or writable, "nothing moves"
assert bytes(answer) == wire
tls.settimeout(patience)
tls.unwrap().close()
"#,
        );
        assert_eq!(server.finish().0.closed(CloseReason::Finished), 1);
    }
}

/// We end first: `recv` says so in order, since close_notify came before FIN.
#[test]
fn our_goodbye_is_an_orderly_end() {
    let Some((site, folder)) = desk() else { return };
    for (name, _) in VERSIONS {
        let server = serve(site.server(), |listen| {
            listen.conn.idle_timeout = Duration::from_millis(200)
        });
        run(
            &folder,
            &server,
            name,
            r#"
tls = connect()
assert tls.recv(1) == b""
tls.close()
"#,
        );
        server.until("it is counted", |stats| {
            stats.closed(CloseReason::IdleTimeout) == 1
        });
    }
}

#[test]
fn a_session_is_resumed_and_a_client_certificate_shown() {
    let Some((site, folder)) = desk() else { return };
    let clients = Authority::new("clients");
    let alice = clients.client("alice");
    folder.file("alice.pem", format!("{}{}", alice.chain_pem, alice.key_pem));
    for (name, _) in VERSIONS {
        let server = serve(site.server_for_clients_of(&clients, false), |_| ());
        run(
            &folder,
            &server,
            name,
            r#"
context.load_cert_chain("alice.pem")
session = None
for visit in range(2):
    tls = connect(session)
    send(tls, b"hello")
    assert receive(tls) == b"hello"
    session = tls.session
    assert tls.session_reused == (visit == 1)
    tls.unwrap().close()
"#,
        );
        let (_, seen) = server.finish();
        let resumed: Vec<_> = seen.agreed.iter().map(|one| one.resumed).collect();
        assert_eq!(resumed, [false, true]);
        assert!(seen
            .agreed
            .iter()
            .all(|one| one.certificates == alice.chain));
    }
}

/// Python closes a socket without close_notify unless asked: whole frames are answered, and the reason tells.
#[test]
fn a_close_without_unwrap_is_a_truncation() {
    let Some((site, folder)) = desk() else { return };
    for (name, _) in VERSIONS {
        let server = serve(site.server(), |_| ());
        run(
            &folder,
            &server,
            name,
            r#"
tls = connect()
send(tls, b"hello")
assert receive(tls) == b"hello"
tls.close()
"#,
        );
        server.until("it is counted", |stats| {
            stats.closed(CloseReason::TlsTruncated) == 1
        });
    }
}

//! OpenSSL's `s_client` is served over TLS 1.2 and 1.3.
#![cfg(feature = "tls")]

use std::io::Write;
use std::process::{ChildStdin, Command};
use std::sync::Arc;

use kit::net::{have, local, ChildProcess, Running};
use kit::tls::{
    agreed, secure, self_signed, spawn_recorder, Authority, Folder, Identity, Seen, Site, NAME,
};
use portcullis::tls::rustls::{version, ProtocolVersion, ServerConfig};
use portcullis::{CloseReason, Config, Framing};

const VERSIONS: [(&str, ProtocolVersion); 2] = [
    ("-tls1_2", ProtocolVersion::TLSv1_2),
    ("-tls1_3", ProtocolVersion::TLSv1_3),
];

fn have_openssl() -> bool {
    have("openssl", "version")
}

fn serve(config: ServerConfig) -> Running<Seen> {
    spawn_recorder(
        Config::new(),
        local()
            .tls(Arc::new(config))
            .with(|listen| listen.framing = Framing::Line),
    )
}

/// What the certificates and keys are in, for `s_client` to read.
struct Desk {
    site: Site,
    folder: Folder,
}

impl Desk {
    fn new() -> Self {
        let (site, folder) = (Site::new(), Folder::new());
        folder.file("ca.pem", site.authority.certificate.pem());
        Self { site, folder }
    }

    /// `s_client` that insists on the right certificate for the right name.
    fn client(&self, server: &Running<Seen>, options: &[&str]) -> Conversation {
        let mut command = Command::new("openssl");
        command
            .current_dir(self.folder.path())
            .args(["s_client", "-connect", &server.addr().to_string()])
            .args([
                "-CAfile",
                "ca.pem",
                "-verify_return_error",
                "-verify_hostname",
                NAME,
            ])
            .args(options);
        Conversation::start(&mut command)
    }

    /// Writes a certificate and key for `-cert` and `-key`.
    fn identity(&self, name: &str, identity: &Identity) {
        self.folder
            .file(&format!("{name}.pem"), &identity.chain_pem);
        self.folder.file(&format!("{name}.key"), &identity.key_pem);
    }
}

/// A running `s_client`, killed when dropped.
struct Conversation {
    child: ChildProcess,
    input: Option<ChildStdin>,
}

impl Conversation {
    fn start(command: &mut Command) -> Self {
        let (child, input) = ChildProcess::interactive(command);
        Self {
            child,
            input: Some(input),
        }
    }

    fn say(&mut self, line: &str) {
        // In one write: a command letter works at once, and s_client may be gone before its line feed.
        let input = self.input.as_mut().expect("not finished");
        input
            .write_all(format!("{line}\n").as_bytes())
            .expect("s_client reads");
    }

    /// Says a line and hears it back, among what else `s_client` prints.
    #[track_caller]
    fn echo(&mut self, line: &str) {
        self.say(line);
        self.hear(line);
    }

    #[track_caller]
    fn hear(&mut self, line: &str) {
        while self.child.line() != line {}
    }

    /// Ends its input: it says goodbye and exits. Returns its status and what it printed since.
    #[track_caller]
    fn finish(mut self) -> (bool, String) {
        self.input = None;
        let (status, out, err) = self.child.finish();
        (status.success(), out + &err)
    }
}

#[test]
fn a_conversation_in_lines() {
    if !have_openssl() {
        return;
    }
    let desk = Desk::new();
    for (option, version) in VERSIONS {
        let server = serve(desk.site.server());
        let mut client = desk.client(&server, &[option, "-servername", NAME, "-status"]);
        for line in ["hello", "a longer line", "", "the last"] {
            client.echo(line);
        }
        let (success, log) = client.finish();
        assert!(success, "{log}");
        let seen = &agreed(&server, 1)[0];
        assert_eq!(
            (seen.version, seen.server_name.as_deref()),
            (Some(version), Some(NAME))
        );
        let (stats, seen) = server.finish();
        assert_eq!(stats.traffic.frames_in, 4);
        assert_eq!(seen.closed, [(CloseReason::Finished, String::new())]);
    }
}

/// A certificate that vouches for itself is trusted when it is given as the authority, as the echo example's users do.
#[test]
fn a_self_signed_certificate_can_be_trusted() {
    if !have_openssl() {
        return;
    }
    let desk = Desk::new();
    let identity = self_signed(&[NAME]);
    desk.folder.file("ca.pem", &identity.chain_pem);
    for (option, _) in VERSIONS {
        let site = Site {
            authority: Authority::new("unused"),
            identity: self_signed(&[NAME]),
        };
        // Not the one that the client trusts.
        let server = serve(site.server());
        let (success, log) = desk.client(&server, &[option]).finish();
        assert!(!success && log.contains("self-signed certificate"), "{log}");
        server.until("it is refused", |stats| {
            stats.closed(CloseReason::TlsHandshake) == 1 && stats.opened == 0
        });
    }
    let site = Site {
        authority: Authority::new("unused"),
        identity,
    };
    for (option, _) in VERSIONS {
        let server = serve(site.server());
        let mut client = desk.client(&server, &[option]);
        client.echo("trusted");
        assert!(client.finish().0);
    }
}

#[test]
fn alpn_is_agreed() {
    if !have_openssl() {
        return;
    }
    let desk = Desk::new();
    for (option, _) in VERSIONS {
        let mut config = desk.site.server();
        config.alpn_protocols = vec![b"echo/1".to_vec()];
        let server = serve(config);
        let mut client = desk.client(&server, &[option, "-alpn", "other,echo/1"]);
        client.hear("ALPN protocol: echo/1");
        client.echo("hello");
        assert!(client.finish().0);
        assert_eq!(agreed(&server, 1)[0].alpn.as_deref(), Some(&b"echo/1"[..]));
        let (success, log) = desk.client(&server, &[option, "-alpn", "other"]).finish();
        assert!(!success && log.contains("no application protocol"), "{log}");
    }
}

#[test]
fn a_client_certificate_is_shown() {
    if !have_openssl() {
        return;
    }
    let (desk, clients) = (Desk::new(), Authority::new("clients"));
    let (alice, mallory) = (
        clients.client("alice"),
        Authority::new("strangers").client("mallory"),
    );
    desk.identity("alice", &alice);
    desk.identity("mallory", &mallory);
    for (option, _) in VERSIONS {
        let server = serve(desk.site.server_for_clients_of(&clients, false));
        let mut client = desk.client(
            &server,
            &[option, "-cert", "alice.pem", "-key", "alice.key"],
        );
        client.echo("it is me");
        assert!(client.finish().0);
        assert_eq!(agreed(&server, 1)[0].certificates[0], alice.chain[0]);
        for refused in [&["-cert", "mallory.pem", "-key", "mallory.key"][..], &[]] {
            let options = [&[option][..], refused].concat();
            // In TLS 1.3 the alert comes where it waits for an answer.
            let mut client = desk.client(&server, &options);
            let _ = writeln!(client.input.as_mut().expect("running"), "let me in");
            let (status, out, err) = client.child.finish();
            assert!(!status.success() && err.contains("alert"), "{out}{err}");
        }
        let stats = server.until("both are refused", |stats| stats.closed_total() == 3);
        assert_eq!(stats.closed(CloseReason::TlsHandshake), 2);
    }
}

/// Sessions kept in a file, and `-reconnect`'s five further connections with the first one's session.
#[test]
fn sessions_are_resumed() {
    if !have_openssl() {
        return;
    }
    let desk = Desk::new();
    for (option, _) in VERSIONS {
        let server = serve(desk.site.server());
        for file in ["-sess_out", "-sess_in"] {
            let mut client = desk.client(&server, &[option, file, "session.pem"]);
            client.echo("hello");
            assert!(client.finish().0);
        }
        let resumed: Vec<_> = agreed(&server, 2).iter().map(|one| one.resumed).collect();
        assert_eq!(resumed, [false, true], "{option}");
    }
    let server = serve(desk.site.server());
    let mut client = desk.client(&server, &["-tls1_2", "-reconnect"]);
    client.echo("hello");
    assert!(client.finish().0);
    let resumed: Vec<_> = agreed(&server, 6).iter().map(|one| one.resumed).collect();
    assert_eq!(resumed, [false, true, true, true, true, true]);
}

/// The first key share is one that we do not have: we ask for another.
#[test]
fn a_hello_is_asked_for_again() {
    if !have_openssl() {
        return;
    }
    let desk = Desk::new();
    let server = serve(desk.site.server());
    let mut client = desk.client(&server, &["-tls1_3", "-groups", "P-521:P-384"]);
    client.echo("second try");
    assert!(client.finish().0);
}

/// Each suite alone. A certificate with an ECDSA key fits them all.
#[test]
fn every_suite_is_spoken() {
    if !have_openssl() {
        return;
    }
    let desk = Desk::new();
    let server = serve(desk.site.server());
    for suite in [
        "TLS_AES_128_GCM_SHA256",
        "TLS_AES_256_GCM_SHA384",
        "TLS_CHACHA20_POLY1305_SHA256",
    ] {
        let mut client = desk.client(&server, &["-tls1_3", "-ciphersuites", suite]);
        client.echo(suite);
        assert!(client.finish().0);
    }
    for suite in [
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
    ] {
        let mut client = desk.client(&server, &["-tls1_2", "-cipher", suite]);
        client.echo(suite);
        assert!(client.finish().0);
    }
}

/// Renegotiation is refused with a warning alert, on which OpenSSL gives up. Nothing hangs, and
/// others are served.
#[test]
fn renegotiation_is_refused() {
    if !have_openssl() {
        return;
    }
    let desk = Desk::new();
    let server = serve(desk.site.server());
    let mut client = desk.client(&server, &["-tls1_2"]);
    client.echo("hello");
    client.say("R");
    let (status, out, err) = client.child.finish();
    assert!(
        !status.success() && err.contains("no renegotiation"),
        "{out}{err}"
    );
    server.until("it is gone", |stats| stats.open == 0);
    let mut other = desk.client(&server, &["-tls1_2"]);
    other.echo("served");
    assert!(other.finish().0);
}

/// `K` asks for new keys in both directions.
#[test]
fn keys_change() {
    if !have_openssl() {
        return;
    }
    let desk = Desk::new();
    let server = serve(desk.site.server());
    let mut client = desk.client(&server, &["-tls1_3"]);
    for round in ["one", "two", "three"] {
        client.echo(round);
        client.say("K");
        // A command is one only at the start of what is read at once.
        while client.child.error_line() != "KEYUPDATE" {}
    }
    client.echo("the last");
    assert!(client.finish().0);
    assert_eq!(
        server.finish().1.closed,
        [(CloseReason::Finished, String::new())]
    );
}

/// A client with an old version gets an alert.
#[test]
fn tls_1_1_is_refused_with_an_alert() {
    if !have_openssl() {
        return;
    }
    let desk = Desk::new();
    let server = serve(desk.site.server());
    let client = desk.client(&server, &["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]);
    let (success, log) = client.finish();
    if log.contains("no protocols available") {
        eprintln!("SKIPPED: this openssl cannot offer TLS 1.1");
        return;
    }
    assert!(!success && log.contains("alert"), "{log}");
    let stats = server.until("it is counted", |stats| stats.closed_total() == 1);
    assert_eq!(stats.closed(CloseReason::TlsHandshake), 1);
}

/// The server ends, and `s_client` sees an orderly end.
#[test]
fn a_drain_ends_the_conversation_in_order() {
    if !have_openssl() {
        return;
    }
    let desk = Desk::new();
    for (option, _) in VERSIONS {
        let server = serve(desk.site.server());
        let mut client = desk.client(&server, &[option]);
        client.echo("hello");
        let (stats, _) = server.finish();
        assert_eq!(stats.closed(CloseReason::Drained), 1);
        let (status, out, err) = client.child.finish();
        assert!(status.success(), "{out}{err}");
        assert!(
            !err.contains("unexpected eof"),
            "close_notify came before FIN: {err}"
        );
    }
}

/// Twenty thousand lines through a pipe, with a client of our own beside it.
#[test]
fn a_long_text_passes() {
    if !have_openssl() {
        return;
    }
    let desk = Desk::new();
    for (option, _) in VERSIONS {
        let server = serve(desk.site.server());
        let mut other = secure(server.addr(), &desk.site.client(&version::TLS13));
        let Conversation { child, input } = desk.client(&server, &[option, "-nocommands"]);
        let mut input = input.expect("running");
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                for number in 0..20_000 {
                    writeln!(input, "line {number}").expect("s_client reads");
                }
                writeln!(input, "end").expect("s_client reads");
                input
            });
            let mut expected = 0;
            loop {
                let line = child.line();
                if line == "end" {
                    break;
                }
                if line.starts_with("line ") {
                    assert_eq!(line, format!("line {expected}"));
                    expected += 1;
                }
            }
            assert_eq!(expected, 20_000);
            // Its end would have been the conversation's.
            drop(writer.join().expect("no panic"));
        });
        ping_line(&mut other);
    }
}

fn ping_line(client: &mut kit::tls::TlsClient) {
    client.write_all(b"beside\n").expect("sent");
    let mut line = [0; 7];
    std::io::Read::read_exact(client, &mut line).expect("an answer");
    assert_eq!(&line, b"beside\n");
}

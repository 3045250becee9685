//! The STARTTLS example, as mail clients meet it: OpenSSL's `s_client -starttls smtp`, and a client that injects commands.
#![cfg(all(feature = "tls", any(feature = "ring", feature = "aws-lc-rs")))]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use kit::net::{connect, example, have, read_to_end, ChildProcess};
use kit::tls::{handshake_over, session, Folder, Site, TlsClient, NAME, VERSIONS};

fn start(site: &Site, folder: &Folder) -> (ChildProcess, SocketAddr) {
    let mut command = Command::new(example("starttls"));
    command
        .args(["--listen", "127.0.0.1:0", "--tls-cert"])
        .arg(folder.file("chain.pem", &site.identity.chain_pem))
        .arg("--tls-key")
        .arg(folder.file("key.pem", &site.identity.key_pem));
    let child = ChildProcess::start(&mut command);
    let addr = child.address();
    (child, addr)
}

/// Says a line and returns the last line of the answer.
#[track_caller]
fn ask(stream: &mut (impl Read + Write), line: &str) -> String {
    stream
        .write_all(format!("{line}\r\n").as_bytes())
        .expect("sent");
    answer(stream)
}

/// An answer's last line is the one without a hyphen behind its number (RFC 5321 section 4.2.1).
#[track_caller]
fn answer(stream: &mut impl Read) -> String {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer");
        line.push(byte[0]);
        if line.ends_with(b"\r\n") {
            if line.get(3) != Some(&b'-') {
                return String::from_utf8(line).expect("text").trim_end().to_owned();
            }
            line.clear();
        }
    }
}

/// Through greeting and STARTTLS, to where TLS begins.
#[track_caller]
fn greet(addr: SocketAddr) -> TcpStream {
    let mut tcp = connect(addr);
    assert_eq!(answer(&mut tcp), "220 localhost ESMTP");
    assert_eq!(ask(&mut tcp, "EHLO tester"), "250 HELP");
    assert_eq!(
        ask(&mut tcp, "help"),
        "214 Hello tester, we talk in the clear"
    );
    assert_eq!(ask(&mut tcp, "STARTTLS now"), "501 No parameters allowed");
    tcp
}

#[test]
fn a_client_upgrades_and_is_a_stranger_again() {
    let (site, folder) = (Site::new(), Folder::new());
    let (_child, addr) = start(&site, &folder);
    for version in VERSIONS {
        let mut tcp = greet(addr);
        assert_eq!(ask(&mut tcp, "STARTTLS"), "220 Go ahead");
        let mut tls: TlsClient =
            handshake_over(tcp, session(&site.client(version))).expect("the handshake");
        assert_eq!(
            ask(&mut tls, "HELP"),
            "214 Hello stranger, we talk behind TLS"
        );
        assert_eq!(ask(&mut tls, "EHLO again"), "250 HELP");
        assert_eq!(ask(&mut tls, "STARTTLS"), "503 TLS is on already");
        assert_eq!(ask(&mut tls, "QUIT"), "221 Bye");
        assert_eq!(kit::tls::read_to_goodbye(&mut tls), b"");
    }
}

/// CVE-2011-0411.
#[test]
fn an_injected_command_is_not_answered() {
    let (site, folder) = (Site::new(), Folder::new());
    let (_child, addr) = start(&site, &folder);
    let mut tcp = greet(addr);
    tcp.write_all(b"STARTTLS\r\nEHLO injected\r\n")
        .expect("sent");
    let rest = read_to_end(&mut tcp);
    assert!(rest.starts_with(b"220 Go ahead\r\n"), "{rest:?}");
    assert!(!rest.windows(3).any(|window| window == b"250"), "{rest:?}");
}

#[test]
fn s_client_upgrades_over_smtp() {
    if !have("openssl", "version") {
        return;
    }
    let (site, folder) = (Site::new(), Folder::new());
    let (_child, addr) = start(&site, &folder);
    folder.file("ca.pem", site.authority.certificate.pem());
    for version in ["-tls1_2", "-tls1_3"] {
        let mut command = Command::new("openssl");
        command
            .current_dir(folder.path())
            .args([
                "s_client",
                "-connect",
                &addr.to_string(),
                "-starttls",
                "smtp",
                "-quiet",
                version,
            ])
            .args([
                "-CAfile",
                "ca.pem",
                "-verify_return_error",
                "-verify_hostname",
                NAME,
            ]);
        let (client, mut input) = ChildProcess::interactive(&mut command);
        input.write_all(b"HELP\r\n").expect("s_client reads");
        let mut line = client.line();
        // s_client shows the last answer in the clear.
        if line.starts_with("250") {
            line = client.line();
        }
        assert_eq!(line.trim_end(), "214 Hello stranger, we talk behind TLS");
        input.write_all(b"QUIT\r\n").expect("s_client reads");
        assert_eq!(client.line().trim_end(), "221 Bye");
        let (status, _, log) = client.finish();
        assert!(status.success(), "{log}");
    }
}

#[test]
fn it_says_what_it_is() {
    let output = Command::new(example("starttls"))
        .arg("--help")
        .output()
        .expect("it runs");
    let mut lines = BufReader::new(&output.stdout[..]).lines();
    let first = lines.next().expect("a line").expect("text");
    assert!(first.contains("STARTTLS"), "{first}");
}

#[test]
fn sigint_drains() {
    let (site, folder) = (Site::new(), Folder::new());
    let (child, addr) = start(&site, &folder);
    let tcp = greet(addr);
    child.signal("INT");
    drop(tcp);
    let (status, _, log) = child.finish();
    assert!(status.success(), "{status}: {log}");
}

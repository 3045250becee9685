//! The login example: a stranger's lines, an upgrade to TLS, and a session in packets on the same connection.
#![cfg(all(feature = "tls", any(feature = "ring", feature = "aws-lc-rs")))]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use kit::net::{connect, example, packet2, read_to_end, recv2, send2, ChildProcess};
use kit::tls::{handshake_over, read_to_goodbye, session, Folder, Site, TlsClient, VERSIONS};

fn start(site: &Site, folder: &Folder) -> (ChildProcess, SocketAddr) {
    let mut command = Command::new(example("login"));
    command
        .arg("127.0.0.1:0")
        .arg(folder.file("chain.pem", &site.identity.chain_pem))
        .arg(folder.file("key.pem", &site.identity.key_pem));
    let child = ChildProcess::start(&mut command);
    let addr = child.address();
    (child, addr)
}

#[track_caller]
fn hear(stream: &mut impl Read, line: &str) {
    let mut heard = vec![0; line.len()];
    stream.read_exact(&mut heard).expect("an answer");
    assert_eq!(String::from_utf8_lossy(&heard), line);
}

#[track_caller]
fn ask(stream: &mut (impl Read + Write), line: &str, answer: &str) {
    stream.write_all(line.as_bytes()).expect("sent");
    hear(stream, answer);
}

fn greeted(addr: SocketAddr) -> TcpStream {
    let mut tcp = connect(addr);
    hear(&mut tcp, "220 hello\r\n");
    tcp
}

fn secure(addr: SocketAddr, site: &Site, version: usize) -> TlsClient {
    let mut tcp = greeted(addr);
    ask(&mut tcp, "EHLO me\r\n", "250 STARTTLS\r\n");
    ask(&mut tcp, "STARTTLS\r\n", "220 go ahead\r\n");
    handshake_over(tcp, session(&site.client(VERSIONS[version]))).expect("the handshake")
}

#[test]
fn a_stranger_becomes_a_user_on_the_same_connection() {
    let (site, folder) = (Site::new(), Folder::new());
    let (server, addr) = start(&site, &folder);
    for (number, version) in (1..).zip(0..VERSIONS.len()) {
        let mut tls = secure(addr, &site, version);
        ask(&mut tls, "EHLO me\r\n", "250 LOGIN\r\n");
        ask(&mut tls, "LOGIN ada wrong\r\n", "535 no\r\n");
        // The first packets stand right behind the last line, in one record.
        let wire = [
            &b"LOGIN ada secret\r\n"[..],
            &packet2(b"one\r\n"),
            &packet2(b""),
        ]
        .concat();
        tls.write_all(&wire).expect("sent");
        hear(&mut tls, &format!("230 session {number}\r\n"));
        assert_eq!(
            recv2(&mut tls),
            format!("ada, session {number}, frame 1: one\r\n").as_bytes()
        );
        assert_eq!(
            recv2(&mut tls),
            format!("ada, session {number}, frame 2: ").as_bytes()
        );
        send2(&mut tls, b"LOGIN bob secret");
        let third = format!("ada, session {number}, frame 3: LOGIN bob secret");
        assert_eq!(recv2(&mut tls), third.as_bytes(), "no line any more");
    }
    server.signal("TERM");
    let (status, _, log) = server.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
}

#[test]
fn no_password_goes_in_the_clear_and_three_are_enough() {
    let (site, folder) = (Site::new(), Folder::new());
    let (_server, addr) = start(&site, &folder);
    let mut tcp = greeted(addr);
    ask(&mut tcp, "LOGIN ada secret\r\n", "530 STARTTLS first\r\n");
    ask(&mut tcp, "dance\r\n", "500 EHLO, STARTTLS or LOGIN\r\n");
    ask(&mut tcp, "\r\n", "500 EHLO, STARTTLS or LOGIN\r\n");
    tcp.write_all(b"STARTTLS\r\nLOGIN ada secret\r\n")
        .expect("sent");
    let rest = read_to_end(&mut tcp);
    assert!(
        rest.starts_with(b"220 go ahead\r\n") && !rest.windows(3).any(|word| word == b"230"),
        "{rest:?}"
    );
    let mut tls = secure(addr, &site, 0);
    for _ in 0..3 {
        ask(&mut tls, "LOGIN ada guess\r\n", "535 no\r\n");
    }
    assert_eq!(read_to_goodbye(&mut tls), b"");
}

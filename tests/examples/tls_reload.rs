//! The reload example: SIGHUP brings the new certificate, a broken file changes nothing and is
//! named, and open connections go on.
#![cfg(all(feature = "tls", any(feature = "ring", feature = "aws-lc-rs")))]

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use kit::net::{example, ChildProcess};
use kit::tls::{handshake, secure, Folder, Site, TlsClient, VERSIONS};

struct Desk {
    folder: Folder,
    chain: PathBuf,
    key: PathBuf,
}

impl Desk {
    fn new(site: &Site) -> Self {
        let folder = Folder::new();
        let (chain, key) = (
            folder.path().join("chain.pem"),
            folder.path().join("key.pem"),
        );
        let desk = Self { folder, chain, key };
        desk.put(site);
        desk
    }

    fn put(&self, site: &Site) {
        self.folder.file("chain.pem", &site.identity.chain_pem);
        self.folder.file("key.pem", &site.identity.key_pem);
    }

    fn command(&self) -> Command {
        let mut command = Command::new(example("tls_reload"));
        command
            .args(["--listen", "127.0.0.1:0", "--tls-cert"])
            .arg(&self.chain)
            .arg("--tls-key")
            .arg(&self.key);
        command
    }
}

#[track_caller]
fn ask(client: &mut TlsClient, line: &str) {
    client.write_all(line.as_bytes()).expect("sent");
    let mut echo = vec![0; line.len()];
    client.read_exact(&mut echo).expect("an echo");
    assert_eq!(echo, line.as_bytes());
}

/// A client that trusts this site is served.
#[track_caller]
fn serves(addr: SocketAddr, site: &Site) -> TlsClient {
    let mut client = secure(addr, &site.client(VERSIONS[1]));
    ask(&mut client, "hello\n");
    client
}

/// SIGHUP, and what the log says to it: one line, the first that names a certificate.
#[track_caller]
fn reload(child: &ChildProcess) -> String {
    child.signal("HUP");
    loop {
        let line = child.error_line();
        if line.contains("certificate") {
            return line;
        }
    }
}

#[test]
fn a_signal_brings_the_new_certificate_and_a_broken_file_does_not() {
    let (old, new) = (Site::new(), Site::new());
    let desk = Desk::new(&old);
    let child = ChildProcess::start(&mut desk.command());
    let addr = child.address();
    let mut early = serves(addr, &old);

    desk.folder
        .file("chain.pem", "-----BEGIN CERTIFICATE-----\nhalf of it");
    let line = reload(&child);
    assert!(
        line.contains("stays as it was") && line.contains("chain.pem is cut off"),
        "{line}"
    );
    serves(addr, &old);

    // One of the two has been replaced: they do not belong together.
    desk.folder.file("chain.pem", &new.identity.chain_pem);
    let line = reload(&child);
    assert!(
        line.contains("stays as it was") && line.contains("key.pem does not belong"),
        "{line}"
    );
    serves(addr, &old);

    std::fs::remove_file(&desk.key).expect("ours");
    let line = reload(&child);
    assert!(
        line.contains("stays as it was") && line.contains("key.pem cannot be read"),
        "{line}"
    );

    desk.put(&new);
    let line = reload(&child);
    assert!(
        line.contains("new connections get the certificate") && line.contains("chain.pem"),
        "{line}"
    );
    serves(addr, &new);
    handshake(addr, &old.client(VERSIONS[1])).expect_err("the old certificate is gone");
    ask(&mut early, "who is connected does not notice\n");
    drop(early);

    child.signal("TERM");
    let (status, _, log) = child.finish();
    assert!(status.success(), "{log}");
    assert!(!log.contains("stays as it was"), "one line for each: {log}");
}

#[test]
fn without_a_good_certificate_it_does_not_start() {
    let desk = Desk::new(&Site::new());
    desk.folder.file("key.pem", "");
    let (status, _, log) = ChildProcess::start(&mut desk.command()).finish();
    assert_eq!(status.code(), Some(1));
    assert!(
        log.contains("tls_reload: ") && log.contains("key.pem holds no private key"),
        "{log}"
    );
}

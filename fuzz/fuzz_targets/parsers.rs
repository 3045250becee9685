//! What people write by hand: certificates and keys in PEM, and the echo example's command line.
//!
//! The first byte of the input chooses. Nothing may panic; what is refused is refused with words that help, and what
//! is taken works.
#![no_main]

use std::cell::RefCell;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStringExt;
use std::sync::OnceLock;
use std::time::Duration;

use kit::unlinked::Unlinked;
use libfuzzer_sys::fuzz_target;
use portcullis::sim::Sim;
use portcullis::tls::rustls::pki_types::PrivatePkcs8KeyDer;
use portcullis::tls::rustls::ServerConnection;
use portcullis::{Config, Context, Handler, Listen, Outcome};

#[path = "../../examples/support/options.rs"]
#[allow(dead_code)] // the example uses more of it
mod options;
use options::framing::FramingName;
use options::{or_never, Options};

fuzz_target!(|input: &[u8]| {
    let Some((choice, rest)) = input.split_first() else {
        return;
    };
    let good = Identity::get();
    match choice % 5 {
        0 => load(rest, &good.key),
        1 => load(&good.chain, rest),
        2 => load(rest, rest),
        3 => load_damaged(rest),
        _ => parse_command_line(rest),
    }
});

// --- PEM ---

/// A certificate with its authority's behind it, and its key.
struct Identity {
    chain: Vec<u8>,
    key: Vec<u8>,
}

impl Identity {
    /// The same in every run, so that a finding can be reproduced.
    fn get() -> &'static Self {
        static IDENTITY: OnceLock<Identity> = OnceLock::new();
        IDENTITY.get_or_init(|| Self::make().expect("a test certificate"))
    }

    fn make() -> Result<Self, rcgen::Error> {
        let (authority_key, key) = (ed25519(1)?, ed25519(2)?);
        let params = rcgen::CertificateParams::new(Vec::new())?;
        let authority = params.self_signed(&authority_key)?;
        let issuer = rcgen::Issuer::new(params, authority_key);
        let own =
            rcgen::CertificateParams::new(["localhost".to_owned()])?.signed_by(&key, &issuer)?;
        Ok(Self {
            chain: [own.pem(), authority.pem()].concat().into_bytes(),
            key: key.serialize_pem().into_bytes(),
        })
    }
}

/// The key whose secret is this byte over and over, in PKCS #8 (RFC 8410, section 7).
fn ed25519(secret: u8) -> Result<rcgen::KeyPair, rcgen::Error> {
    const HEAD: [u8; 16] = [
        0x30, 0x2E, 2, 1, 0, 0x30, 5, 6, 3, 0x2B, 0x65, 0x70, 4, 0x22, 4, 0x20,
    ];
    let der = PrivatePkcs8KeyDer::from([&HEAD[..], &[secret; 32]].concat());
    rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&der, &rcgen::PKCS_ED25519)
}

fn load(chain: &[u8], key: &[u8]) {
    thread_local!(static FILES: RefCell<[Unlinked; 2]> = RefCell::new(["chain", "key"].map(Unlinked::new)));
    FILES.with_borrow_mut(|files| {
        files[0].put(chain).expect("a file takes all");
        files[1].put(key).expect("a file takes all");
        match portcullis::tls::server_config(files[0].path(), files[1].path()) {
            Ok(config) => drop(ServerConnection::new(config).expect("what is taken works")),
            Err(error) => {
                let words = error.to_string();
                let names = |file: &Unlinked| words.starts_with(&*file.path().to_string_lossy());
                assert!(files.iter().any(names), "{words}");
                assert!(
                    words.len() < 400 && !words.chars().any(char::is_control),
                    "{words:?}"
                );
                let line = Identity::get()
                    .key
                    .split(|&byte| byte == b'\n')
                    .nth(1)
                    .expect("a key has a body");
                let mut parts = line.windows(16).map(String::from_utf8_lossy);
                let words = format!("{error} {error:?}");
                assert!(
                    !parts.any(|part| words.contains(&*part)),
                    "{words} tells the key"
                );
            }
        }
    });
}

/// A good chain and key, with something done to them: see [`damage`].
fn load_damaged(edits: &[u8]) {
    let Identity { chain, key } = Identity::get();
    let (mut chain, mut key) = (chain.clone(), key.clone());
    for edit in edits.chunks_exact(4) {
        let whose = if edit[0] < 128 { &mut chain } else { &mut key };
        damage(whose, [edit[0], edit[1], edit[2], edit[3]]);
    }
    load(&chain, &key);
}

/// One edit: what, where (two bytes), and how much or with what.
fn damage(pem: &mut Vec<u8>, [what, high, low, how]: [u8; 4]) {
    const WORDS: [&str; 8] = [
        "-----BEGIN CERTIFICATE-----\n",
        "-----END CERTIFICATE-----\n",
        "-----BEGIN PRIVATE KEY-----\n",
        "-----END PRIVATE KEY-----\n",
        "-----BEGIN EC PRIVATE KEY-----\n",
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\n",
        "\r\n",
        "Proc-Type: 4,ENCRYPTED\n",
    ];
    let at = usize::from(u16::from_be_bytes([high, low])) % (pem.len() + 1);
    let end = (at + usize::from(how) + 1).min(pem.len());
    match what % 5 {
        0 => drop(pem.drain(at..end)),
        1 => pem.insert(at, how),
        2 => pem
            .iter_mut()
            .skip(at)
            .take(1)
            .for_each(|byte| *byte ^= how),
        3 => drop(pem.splice(at..at, pem[at..end].to_vec())),
        _ => drop(pem.splice(at..at, WORDS[usize::from(how) % WORDS.len()].bytes())),
    }
}

// --- the command line ---

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// One argument a line, which may be anything but zero bytes.
fn parse_command_line(lines: &[u8]) {
    let arguments = lines
        .split(|&byte| byte == b'\n')
        .map(|line| OsString::from_vec(line.to_vec()));
    match options::parse_from([OsString::from("echo")].into_iter().chain(arguments)) {
        Ok(options) => serve(&options),
        Err(error) => {
            let words = error.to_string();
            assert!(
                !error.use_stderr() || words.starts_with("error: "),
                "{words}"
            );
            assert_eq!(
                error.exit_code(),
                if error.use_stderr() { 2 } else { 0 },
                "{words}"
            );
        }
    }
}

/// What parses is refused in words, or echoes and drains.
fn serve(options: &Options) {
    if asks_a_resolver(&options.listen) {
        return;
    }
    let mut listen = Listen::tcp(options.listen.as_str(), options.framing.framing());
    listen.conn.idle_timeout = or_never(options.idle_timeout);
    listen.conn.handshake_timeout = or_never(options.handshake_timeout);
    if let Some(bytes) = options.max_packet {
        listen.conn.max_frame = Some(bytes);
    }
    // Certificates in files are loaded elsewhere; these would be any files of this machine.
    if options.tls_self_signed {
        listen = options
            .add_tls(listen)
            .expect("a certificate for localhost");
    }
    let config = Config::max_connections(options.max_connections);
    let listening = Sim::try_new(0, config, ()).and_then(|mut sim| {
        let addr = sim.listen(listen, |_app, _peer| Echo)?;
        Ok((sim, addr))
    });
    let (mut sim, addr) = match listening {
        Ok(listening) => listening,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    assert!(options.try_it(&addr.into()).contains(&addr.to_string()));
    let client = sim.connect(addr).expect("a backlog with room");
    if !options.tls_self_signed {
        let wire = one_byte(options.framing);
        sim.send(client, wire);
        sim.settle();
        let echo = if options.max_connections > 0 {
            wire
        } else {
            b""
        };
        assert_eq!(sim.received(client), echo);
    }
    sim.control().drain(options.grace);
    sim.finish(client);
    sim.advance(Duration::from_secs(60));
    assert!(sim.drain_report().is_some(), "the drain does not end");
}

/// A host by its name: a look-up would ask the network.
fn asks_a_resolver(addr: &str) -> bool {
    let port = addr.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
    addr.parse::<SocketAddr>().is_err() && matches!(port, Some(Ok(_)))
}

/// The smallest frame that is not empty.
fn one_byte(framing: FramingName) -> &'static [u8] {
    match framing {
        FramingName::Packet1 => b"\x01x",
        FramingName::Packet2 => b"\x00\x01x",
        FramingName::Packet4 => b"\x00\x00\x00\x01x",
        FramingName::Raw => b"x",
        FramingName::Line => b"\n",
    }
}

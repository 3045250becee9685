//! Certificates made for one test, and a rustls client over a blocking socket.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

#[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
use portcullis::tls::rustls::crypto;
use portcullis::tls::rustls::crypto::CryptoProvider;
use portcullis::tls::rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName,
};
use portcullis::tls::rustls::server::WebPkiClientVerifier;
use portcullis::tls::rustls::{
    version, ClientConfig, ClientConnection, ProtocolVersion, RootCertStore, ServerConfig,
    StreamOwned, SupportedProtocolVersion,
};
use portcullis::tls::TlsConfig;
use portcullis::{Context, Handle, HandleError, Handler, Listen, Outcome, Peer, Refuse, Service};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};

use crate::net::{connect, ping, spawn, Echo, ReadSome, Running, PATIENCE};

/// The name that every server certificate here is for.
pub const NAME: &str = "server.test";

/// Both protocol versions, for tests that hold for each.
pub const VERSIONS: [&SupportedProtocolVersion; 2] = [&version::TLS12, &version::TLS13];

/// The cryptography that this was built with.
pub fn provider() -> Arc<CryptoProvider> {
    #[cfg(feature = "aws-lc-rs")]
    return Arc::new(crypto::aws_lc_rs::default_provider());
    #[cfg(all(feature = "ring", not(feature = "aws-lc-rs")))]
    return Arc::new(crypto::ring::default_provider());
    #[cfg(not(any(feature = "ring", feature = "aws-lc-rs")))]
    panic!("built with the feature `tls` but without `ring` or `aws-lc-rs`");
}

/// A certificate chain and its key.
pub struct Identity {
    pub chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
    pub chain_pem: String,
    pub key_pem: String,
}

impl Identity {
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }

    fn new(chain: &[&rcgen::Certificate], key: &KeyPair) -> Self {
        Self {
            chain: chain
                .iter()
                .map(|certificate| certificate.der().clone())
                .collect(),
            key: key.serialize_der(),
            chain_pem: chain.iter().map(|certificate| certificate.pem()).collect(),
            key_pem: key.serialize_pem(),
        }
    }
}

/// A certificate that vouches for itself, for these names.
pub fn self_signed(names: &[&str]) -> Identity {
    let key = KeyPair::generate().expect("a key");
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let certificate = CertificateParams::new(names)
        .and_then(|params| params.self_signed(&key))
        .expect("a certificate");
    Identity::new(&[&certificate], &key)
}

/// Signs certificates.
pub struct Authority {
    pub certificate: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key).expect("a certificate");
        Self {
            certificate,
            issuer: Issuer::new(params, key),
        }
    }

    /// A server's certificate for [`NAME`], with this authority's own after it.
    pub fn server(&self) -> Identity {
        self.server_for(NAME)
    }

    pub fn server_for(&self, name: &str) -> Identity {
        self.issue(name, ExtendedKeyUsagePurpose::ServerAuth, 4096)
    }

    /// A client's certificate.
    pub fn client(&self, name: &str) -> Identity {
        self.client_until(name, 4096)
    }

    /// One that is good until this year begins.
    pub fn client_until(&self, name: &str, year: i32) -> Identity {
        self.issue(name, ExtendedKeyUsagePurpose::ClientAuth, year)
    }

    fn issue(&self, name: &str, usage: ExtendedKeyUsagePurpose, until: i32) -> Identity {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.not_after = rcgen::date_time_ymd(until, 1, 1);
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages.push(usage);
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        Identity::new(&[&certificate, &self.certificate], &key)
    }

    pub fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.der().clone()).expect("a root");
        roots
    }
}

/// A server's configuration and clients that trust it.
pub struct Site {
    pub authority: Authority,
    pub identity: Identity,
}

impl Site {
    pub fn new() -> Self {
        Self::of(Authority::new("portcullis test authority"))
    }

    pub fn of(authority: Authority) -> Self {
        let identity = authority.server();
        Self {
            authority,
            identity,
        }
    }

    /// The server's configuration, to be changed further.
    pub fn server(&self) -> ServerConfig {
        ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(self.identity.chain.clone(), self.identity.key())
            .expect("certificate and key")
    }

    /// A server for another name than [`NAME`].
    pub fn server_for(&self, name: &str) -> ServerConfig {
        let identity = self.authority.server_for(name);
        ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(identity.chain.clone(), identity.key())
            .expect("certificate and key")
    }

    /// A server that asks for a client certificate of `authority`, and may do without.
    pub fn server_for_clients_of(&self, authority: &Authority, optional: bool) -> ServerConfig {
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(authority.roots()), provider());
        let verifier = if optional {
            verifier.allow_unauthenticated()
        } else {
            verifier
        };
        ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_client_cert_verifier(verifier.build().expect("verifier"))
            .with_single_cert(self.identity.chain.clone(), self.identity.key())
            .expect("certificate and key")
    }

    /// An anonymous client's configuration, to be changed further.
    pub fn client(&self, version: &'static SupportedProtocolVersion) -> ClientConfig {
        ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[version])
            .expect("versions")
            .with_root_certificates(self.authority.roots())
            .with_no_client_auth()
    }

    pub fn client_with(
        &self,
        version: &'static SupportedProtocolVersion,
        identity: &Identity,
    ) -> ClientConfig {
        ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[version])
            .expect("versions")
            .with_root_certificates(self.authority.roots())
            .with_client_auth_cert(identity.chain.clone(), identity.key())
            .expect("certificate and key")
    }
}

/// A TLS client: reads and writes block, and end after [`crate::net::PATIENCE`].
pub type TlsClient = StreamOwned<ClientConnection, TcpStream>;

/// A client's half of a connection, before anything was sent.
pub fn session(config: &ClientConfig) -> ClientConnection {
    session_for(config, NAME)
}

/// One that asks for another name than [`NAME`].
pub fn session_for(config: &ClientConfig, name: &str) -> ClientConnection {
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    ClientConnection::new(Arc::new(config.clone()), name).expect("a client")
}

/// Connects and does the handshake.
#[track_caller]
pub fn handshake(addr: SocketAddr, config: &ClientConfig) -> io::Result<TlsClient> {
    handshake_over(connect(addr), session(config))
}

#[track_caller]
pub fn handshake_over(tcp: TcpStream, session: ClientConnection) -> io::Result<TlsClient> {
    let mut client = StreamOwned::new(session, tcp);
    while client.conn.is_handshaking() {
        client.conn.complete_io(&mut client.sock)?;
    }
    client.flush()?;
    Ok(client)
}

/// As [`handshake`], asking for another name than [`NAME`].
#[track_caller]
pub fn handshake_as(addr: SocketAddr, config: &ClientConfig, name: &str) -> io::Result<TlsClient> {
    handshake_over(connect(addr), session_for(config, name))
}

/// Stateless tickets, of the cryptography that this was built with.
pub fn ticketer() -> Arc<dyn portcullis::tls::rustls::server::ProducesTickets> {
    #[cfg(feature = "aws-lc-rs")]
    return crypto::aws_lc_rs::Ticketer::new().expect("a ticketer");
    #[cfg(all(feature = "ring", not(feature = "aws-lc-rs")))]
    return crypto::ring::Ticketer::new().expect("a ticketer");
    #[cfg(not(any(feature = "ring", feature = "aws-lc-rs")))]
    panic!("built with the feature `tls` but without `ring` or `aws-lc-rs`");
}

/// A handshake that must go well.
#[track_caller]
pub fn secure(addr: SocketAddr, config: &ClientConfig) -> TlsClient {
    handshake(addr, config).expect("the handshake")
}

/// Sends close_notify. TCP stays open.
#[track_caller]
pub fn notify(client: &mut TlsClient) {
    client.conn.send_close_notify();
    client.flush().expect("close_notify goes out");
}

/// Plaintext up to the server's close_notify; then its FIN must come too. Panics if either is missing.
#[track_caller]
pub fn read_to_goodbye(client: &mut TlsClient) -> Vec<u8> {
    let mut bytes = Vec::new();
    // rustls reports a FIN without close_notify as an error.
    client
        .read_to_end(&mut bytes)
        .expect("close_notify before FIN");
    assert_eq!(
        client
            .sock
            .read_some(&mut [0; 1])
            .expect("no reset after close_notify"),
        0,
        "FIN after close_notify"
    );
    bytes
}

/// What is encrypted and not sent yet.
pub fn wire_of(session: &mut ClientConnection) -> Vec<u8> {
    let mut wire = Vec::new();
    while session.wants_write() {
        session
            .write_tls(&mut wire)
            .expect("a vector takes everything");
    }
    wire
}

/// What this plaintext is on the wire.
pub fn encrypt(session: &mut ClientConnection, plain: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    for chunk in plain.chunks(16 * 1024) {
        session.writer().write_all(chunk).expect("room");
        wire.extend(wire_of(session));
    }
    wire
}

/// Sends everything and close_notify while receiving until the server's close_notify and FIN.
#[track_caller]
pub fn exchange(client: TlsClient, plain: &[u8]) -> Vec<u8> {
    exchange_after(client, plain, || ())
}

/// As [`exchange`], but reads nothing before `wait` has returned.
#[track_caller]
pub fn exchange_after(client: TlsClient, plain: &[u8], wait: impl FnOnce()) -> Vec<u8> {
    let (session, mut reading) = (Mutex::new(client.conn), client.sock);
    let mut writing = reading.try_clone().expect("a second descriptor");
    thread::scope(|scope| {
        let session = &session;
        let writer = scope.spawn(move || -> io::Result<()> {
            for chunk in plain.chunks(16 * 1024) {
                let wire = encrypt(&mut session.lock().expect("not poisoned"), chunk);
                writing.write_all(&wire)?;
            }
            let mut session = session.lock().expect("not poisoned");
            session.send_close_notify();
            writing.write_all(&wire_of(&mut session))
        });
        wait();
        let (mut answer, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
        let mut goodbye = false;
        loop {
            let count = reading
                .read_some(&mut buffer)
                .expect("bytes or an orderly end");
            if count == 0 {
                break;
            }
            let mut wire = &buffer[..count];
            let mut session = session.lock().expect("not poisoned");
            while !wire.is_empty() {
                session.read_tls(&mut wire).expect("room");
                let state = session.process_new_packets().expect("good records");
                goodbye |= state.peer_has_closed();
                let start = answer.len();
                answer.resize(start + state.plaintext_bytes_to_read(), 0);
                session
                    .reader()
                    .read_exact(&mut answer[start..])
                    .expect("plaintext");
                if goodbye {
                    break;
                }
            }
        }
        assert!(goodbye, "close_notify before FIN");
        writer
            .join()
            .expect("writer")
            .expect("everything was taken");
        answer
    })
}

/// FIN, without close_notify.
#[track_caller]
pub fn fin(client: &TlsClient) {
    client.sock.shutdown(Shutdown::Write).expect("FIN");
}

/// Everything that comes, to the end, and that end: `None` is FIN.
#[track_caller]
pub fn read_raw(stream: &mut TcpStream) -> (Vec<u8>, Option<io::Error>) {
    let mut bytes = Vec::new();
    let end = stream.read_to_end(&mut bytes).err();
    if let Some(error) = &end {
        assert!(
            error.kind() != io::ErrorKind::WouldBlock,
            "the connection did not end"
        );
    }
    (bytes, end)
}

/// Reads to the end, which must be FIN; before it, one alert in the clear.
/// Returns its description (RFC 8446 section 6).
#[track_caller]
pub fn alert(stream: &mut TcpStream) -> u8 {
    let (bytes, end) = read_raw(stream);
    assert!(
        end.is_none(),
        "the connection ended with {end:?}, not with FIN"
    );
    match bytes[..] {
        [21, 3, _, 0, 2, 2, description] => description,
        _ => panic!("no fatal alert: {bytes:02x?}"),
    }
}

/// What one handshake agreed on, as a handler sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Agreed {
    pub version: Option<ProtocolVersion>,
    pub resumed: bool,
    pub alpn: Option<Vec<u8>>,
    pub server_name: Option<String>,
    pub certificates: Vec<CertificateDer<'static>>,
}

/// An end, in a form that crosses threads.
pub type End = (portcullis::CloseReason, String);

/// Everything that handlers and service were told.
#[derive(Debug, Default)]
pub struct Seen {
    pub agreed: Vec<Agreed>,
    pub closed: Vec<End>,
    pub failed_accepts: Vec<End>,
}

/// What the server saw of its handshakes, once `count` connections were open.
#[track_caller]
pub fn agreed(server: &Running<Seen>, count: u64) -> Vec<Agreed> {
    server.until("the connections are open", |stats| stats.opened == count);
    server.ask(|seen, _| seen.agreed.clone())
}

/// One round trip, and a goodbye in order.
#[track_caller]
pub fn visit(addr: SocketAddr, config: &ClientConfig) {
    let mut client = secure(addr, config);
    ping(&mut client, b"hello");
    notify(&mut client);
    assert_eq!(read_to_goodbye(&mut client), b"");
}

fn end(closed: &portcullis::Closed) -> End {
    (
        closed.reason,
        closed
            .error
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
    )
}

/// Echoes, and notes in [`Seen`] what it is told.
pub struct Recorder;

impl Handler<Seen> for Recorder {
    fn on_open(&mut self, cx: &mut Context<'_, Seen>) -> Outcome {
        let tls = cx.conn.tls().expect("a TLS connection");
        let agreed = Agreed {
            version: tls.protocol_version(),
            resumed: tls.handshake_kind() == Some(portcullis::tls::rustls::HandshakeKind::Resumed),
            alpn: tls.alpn_protocol().map(<[u8]>::to_vec),
            server_name: tls.server_name().map(str::to_owned),
            certificates: tls.peer_certificates().unwrap_or_default().to_vec(),
        };
        cx.app.agreed.push(agreed);
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Seen>, frame: &[u8]) -> Outcome {
        Handler::<Seen>::on_frame(&mut Echo, cx, frame)
    }

    fn on_close(&mut self, cx: &mut Context<'_, Seen>, closed: &portcullis::Closed) {
        cx.app.closed.push(end(closed));
    }
}

/// Makes [`Recorder`]s, and notes connections that never opened.
pub struct Witnesses;

impl Service<Seen> for Witnesses {
    fn accept(&mut self, _app: &mut Seen, _peer: Peer) -> Result<Box<dyn Handler<Seen>>, Refuse> {
        Ok(Box::new(Recorder))
    }

    fn on_failed_accept(&mut self, app: &mut Seen, _peer: &Peer, closed: &portcullis::Closed) {
        app.failed_accepts.push(end(closed));
    }
}

/// A server of [`Witnesses`].
#[track_caller]
pub fn spawn_recorder(config: portcullis::Config, listen: Listen) -> Running<Seen> {
    spawn(move || {
        let mut server = portcullis::Server::new(config).expect("server");
        server.listen_with(listen, Witnesses).expect("listen");
        (server, Seen::default())
    })
}

/// The one end that was reported, of a connection that had opened or of one that had not.
#[track_caller]
pub fn the_end(server: &Running<Seen>) -> End {
    server.until("the connection ends", |stats| stats.closed_total() == 1);
    server.ask(|seen, _| {
        let ends: Vec<End> = seen
            .closed
            .iter()
            .chain(&seen.failed_accepts)
            .cloned()
            .collect();
        assert_eq!(ends.len(), 1, "one report: {ends:?}");
        ends[0].clone()
    })
}

/// A directory of this test's own, removed when dropped.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "portcullis-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file and returns its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).expect("a file");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Changes the TLS of a listener, on every shard that has it.
pub fn set_tls<A>(
    handle: &Handle<A>,
    listener: &'static str,
    config: impl Into<TlsConfig>,
) -> Result<(), HandleError> {
    let config = config.into();
    handle.change(PATIENCE, move |control| {
        control.set_tls(listener, config.clone())
    })
}

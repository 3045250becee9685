//! TLS on one connection, sans-IO: ciphertext in, plaintext out, and back. The only file that names rustls.
//!
//! Uses rustls' unbuffered connection, because an idle one costs 3.3 KB where the buffered one costs
//! 7.4 KB: buffers are ours, borrowed from the pool while a record is incomplete or unsent.

use std::error::Error as StdError;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{Acceptor, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic};
use rustls::{CipherSuite, CommonState, HandshakeKind, ProtocolVersion, ServerConfig};

use super::outbox::Outbox;
use super::pool::{lasting, Pool};

/// Ciphertext held for one connection: a handshake message of 64 KiB, rustls' own maximum, and the record it ends in.
const MAX_HELD: usize = 0x1_0000 + 0x4800;
/// Plaintext encrypted for one write: four full records.
const ENCRYPT_CHUNK: usize = 64 * 1024;
/// What a record adds to its plaintext, at most: header, TLS 1.2 nonce, content type and tag, rounded up.
const RECORD_OVERHEAD: usize = 64;
const RECORD_PAYLOAD: usize = 16 * 1024;

/// What makes a listener speak TLS.
pub(crate) type TlsConfig = Arc<ServerConfig>;

/// The configuration without early data: it comes before the handshake proves who sends it, and can be replayed.
pub(crate) fn without_early_data(config: TlsConfig) -> TlsConfig {
    if config.max_early_data_size == 0 {
        return config;
    }
    let mut config = ServerConfig::clone(&config);
    config.max_early_data_size = 0;
    Arc::new(config)
}

/// One connection's TLS.
pub(super) struct Session {
    stage: Stage,
    /// Incomplete records, and the records of an incomplete handshake message.
    held: Vec<u8>,
    /// Ciphertext waiting for the kernel.
    outbound: Outbox,
    /// How much of `outbound` TLS says by itself: handshake, tickets, key updates.
    own: usize,
    /// The very first byte from the peer, which tells TLS from something else.
    first: Option<u8>,
    /// The name in the ClientHello, which rustls' unbuffered connection keeps to itself.
    server_name: Option<Box<str>>,
    peer_closed: bool,
    notified: bool,
    failure: Failure,
}

/// Whether this session has failed, and with what until somebody took it.
enum Failure {
    None,
    New(Box<dyn StdError>),
    Told,
}

#[allow(clippy::large_enum_variant)] // a session is boxed already, and spends its life in the large one
enum Stage {
    /// The ClientHello is read from a copy: only `Acceptor` shows it.
    Hello(Box<Acceptor>, TlsConfig),
    /// rustls at work.
    Running(UnbufferedServerConnection),
}

/// What to do once rustls has nothing left to say.
enum Wish<'a> {
    Nothing,
    Encrypt(&'a [u8]),
    CloseNotify,
}

impl Session {
    pub(super) fn new(config: &TlsConfig) -> Self {
        Self {
            stage: Stage::Hello(Box::default(), Arc::clone(config)),
            held: Vec::new(),
            outbound: Outbox::default(),
            own: 0,
            first: None,
            server_name: None,
            peer_closed: false,
            notified: false,
            failure: Failure::None,
        }
    }

    /// Nothing more can be decrypted or encrypted.
    pub(super) fn has_failed(&self) -> bool {
        !matches!(self.failure, Failure::None)
    }

    /// The failure, once.
    pub(super) fn take_failure(&mut self) -> Option<Box<dyn StdError>> {
        if !self.has_failed() {
            return None;
        }
        match std::mem::replace(&mut self.failure, Failure::Told) {
            Failure::New(error) => Some(error),
            Failure::Told | Failure::None => None,
        }
    }

    pub(super) fn is_handshaking(&self) -> bool {
        match &self.stage {
            Stage::Hello(..) => true,
            Stage::Running(connection) => connection.is_handshaking(),
        }
    }

    /// close_notify has come: nothing more will.
    pub(super) fn peer_closed(&self) -> bool {
        self.peer_closed
    }

    /// What came first was not a TLS record (types 20 to 24, RFC 8446 section 5.1) and not an SSLv2 hello.
    pub(super) fn is_not_tls(&self) -> bool {
        self.first
            .is_some_and(|byte| !(20..=24).contains(&byte) && byte & 0x80 == 0)
    }

    /// TLS 1.2 answers close_notify at once and discards the rest (RFC 5246 section 7.2.1); 1.3 may go on writing.
    pub(super) fn closes_both_ways(&self) -> bool {
        self.info().version() == Some(ProtocolVersion::TLSv1_2)
    }

    /// A record has begun to arrive, or a handshake message, and is not whole yet.
    pub(super) fn has_begun(&self) -> bool {
        !self.held.is_empty()
    }

    /// Takes ciphertext from the peer and appends what it decrypts to `plain`. After a failure the
    /// alert for the peer is [`Session::waiting`].
    pub(super) fn receive(&mut self, wire: &mut [u8], plain: &mut Vec<u8>, pool: &mut Pool) {
        if self.peer_closed || self.has_failed() {
            return;
        }
        if let Err(error) = self.decrypt(wire, plain, pool) {
            pool.give(std::mem::take(&mut self.held));
            self.failure = Failure::New(error);
        }
    }

    fn decrypt(&mut self, wire: &mut [u8], plain: &mut Vec<u8>, pool: &mut Pool) -> Result<(), Box<dyn StdError>> {
        self.first = self.first.or_else(|| wire.first().copied());
        if let Stage::Hello(acceptor, config) = &mut self.stage {
            let hello = read_hello(acceptor, wire, self.outbound.tail(pool));
            if self.outbound.is_empty() {
                self.outbound.clear(pool);
            }
            if let Some(name) = hello? {
                self.server_name = name;
                self.stage = Stage::Running(UnbufferedServerConnection::new(Arc::clone(config))?);
            }
        }
        if self.held.is_empty() {
            let consumed = self.pump(wire, plain, Wish::Nothing, pool)?;
            let rest = wire.get(consumed..).unwrap_or_default();
            if !rest.is_empty() && !self.peer_closed {
                self.held = pool.take();
                self.held.extend_from_slice(rest);
            }
        } else {
            let mut held = std::mem::take(&mut self.held);
            held.extend_from_slice(wire);
            match self.pump(&mut held, plain, Wish::Nothing, pool) {
                Ok(consumed) if consumed < held.len() && !self.peer_closed => {
                    held.drain(..consumed);
                    self.held = held;
                }
                outcome => {
                    pool.give(held);
                    outcome?;
                }
            }
        }
        if self.held.len() > MAX_HELD {
            return Err("a handshake message or record is too large".into());
        }
        Ok(())
    }

    /// Encrypts the front of `plain` if no ciphertext waits; returns how much of it was taken.
    pub(super) fn encrypt(&mut self, plain: &[u8], pool: &mut Pool) -> Result<usize, Box<dyn StdError>> {
        if plain.is_empty() || !self.outbound.is_empty() || self.notified || self.is_handshaking() {
            return Ok(0);
        }
        let chunk = plain.get(..ENCRYPT_CHUNK).unwrap_or(plain);
        self.wish(Wish::Encrypt(chunk), pool)?;
        Ok(chunk.len())
    }

    /// Queues close_notify behind what waits, once. Nothing can be said before the handshake is done.
    pub(super) fn close_notify(&mut self, pool: &mut Pool) -> Result<(), Box<dyn StdError>> {
        if self.notified || self.is_handshaking() || self.has_failed() {
            return Ok(());
        }
        self.notified = true;
        self.wish(Wish::CloseNotify, pool)
    }

    pub(super) fn waiting(&self) -> &[u8] {
        self.outbound.waiting()
    }

    /// Of what waits: bytes that no handler has sent. They come first, all but the answer to a key update.
    pub(super) fn own(&self) -> usize {
        self.own
    }

    pub(super) fn advance(&mut self, count: usize, pool: &mut Pool) {
        self.outbound.advance(count, pool);
        self.own = self.own.saturating_sub(count);
    }

    /// Bytes of ciphertext held in either direction.
    pub(super) fn buffered(&self) -> usize {
        self.held.len() + self.outbound.len()
    }

    /// Memory that its buffers take; what rustls keeps of an incomplete ClientHello is another copy of it.
    pub(super) fn memory(&self) -> usize {
        let copies = if matches!(self.stage, Stage::Hello(..)) { 2 } else { 1 };
        lasting(&self.held) * copies + self.outbound.lasting()
    }

    pub(super) fn slim(&mut self, pool: &mut Pool) {
        pool.slim(&mut self.held);
        self.outbound.slim(pool);
    }

    #[cfg(feature = "sim")]
    pub(super) fn is_compact(&self) -> bool {
        self.outbound.is_compact()
    }

    /// Gives back what is held, for a connection that is over.
    pub(super) fn clear(&mut self, pool: &mut Pool) {
        pool.give(std::mem::take(&mut self.held));
        self.outbound.clear(pool);
        self.own = 0;
    }

    fn wish(&mut self, wish: Wish<'_>, pool: &mut Pool) -> Result<(), Box<dyn StdError>> {
        // rustls may hold ranges of an incomplete handshake message: it must see the held bytes again.
        let mut held = std::mem::take(&mut self.held);
        let mut plain = Vec::new();
        let outcome = self.pump(&mut held, &mut plain, wish, pool);
        debug_assert!(plain.is_empty(), "receive leaves no whole record behind");
        if let Ok(consumed) = outcome {
            held.drain(..consumed.min(held.len()));
        }
        if held.is_empty() {
            pool.give(held);
        } else {
            self.held = held;
        }
        outcome.map(drop)
    }

    /// Drives rustls until it needs more input; returns how much of `input` it is done with.
    fn pump(
        &mut self,
        input: &mut [u8],
        plain: &mut Vec<u8>,
        mut wish: Wish<'_>,
        pool: &mut Pool,
    ) -> Result<usize, Box<dyn StdError>> {
        let Self {
            stage,
            outbound,
            own,
            peer_closed,
            ..
        } = self;
        let Stage::Running(connection) = stage else {
            return Ok(0);
        };
        let mut consumed = 0;
        let mut failure = None;
        loop {
            let unread = input.get_mut(consumed..).unwrap_or_default();
            let UnbufferedStatus { mut discard, state } = connection.process_tls_records(unread);
            let mut more = true;
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        plain.extend_from_slice(record.payload);
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    let before = outbound.len();
                    append(outbound.tail(pool), RECORD_PAYLOAD, |space| match data.encode(space) {
                        Ok(written) => Ok(written),
                        Err(EncodeError::InsufficientSize(size)) => Err(Some(size.required_size)),
                        Err(EncodeError::AlreadyEncoded) => Err(None),
                    });
                    *own += outbound.len() - before;
                }
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::PeerClosed) => *peer_closed = true,
                Ok(ConnectionState::WriteTraffic(traffic)) => match std::mem::replace(&mut wish, Wish::Nothing) {
                    Wish::Nothing => more = false,
                    wish => grant(traffic, wish, outbound.tail(pool))?,
                },
                Err(error) if failure.is_none() => failure = Some(error),
                Ok(_) | Err(_) => more = false,
            }
            consumed += discard;
            // After an error rustls hands over the alert that it has for the peer. Asked for more than that, it would
            // judge the same bytes again.
            if !more || (failure.is_some() && !connection.wants_write()) {
                break;
            }
        }
        if outbound.is_empty() {
            outbound.clear(pool);
        }
        match (failure, wish) {
            (Some(error), _) => Err(error.into()),
            (None, Wish::Encrypt(_)) => Err("TLS takes no more data".into()),
            (None, _) => Ok(consumed),
        }
    }

    pub(super) fn info(&self) -> TlsInfo<'_> {
        TlsInfo(self)
    }
}

/// Looks for the ClientHello; `Some(name)` when it is whole. The alert for a bad one is put into `alert`.
#[allow(clippy::type_complexity)] // maybe a hello, maybe with a name
fn read_hello(
    acceptor: &mut Acceptor,
    mut wire: &[u8],
    alert: &mut Vec<u8>,
) -> Result<Option<Option<Box<str>>>, Box<dyn StdError>> {
    while !wire.is_empty() {
        acceptor.read_tls(&mut wire)?;
        match acceptor.accept() {
            Ok(Some(accepted)) => return Ok(Some(accepted.client_hello().server_name().map(Box::from))),
            Ok(None) => {}
            Err((error, mut last_words)) => {
                last_words.write_all(alert)?;
                return Err(error.into());
            }
        }
    }
    Ok(None)
}

/// Encrypts, or says goodbye, at the end of `out`.
fn grant<Data>(
    mut traffic: WriteTraffic<'_, Data>,
    wish: Wish<'_>,
    out: &mut Vec<u8>,
) -> Result<(), Box<dyn StdError>> {
    let room = match wish {
        Wish::Encrypt(plain) => plain.len() + (plain.len() / RECORD_PAYLOAD + 1) * RECORD_OVERHEAD,
        Wish::CloseNotify | Wish::Nothing => RECORD_OVERHEAD,
    };
    let granted = append(out, room, |space| {
        let written = match wish {
            Wish::Encrypt(plain) => traffic.encrypt(plain, space),
            Wish::CloseNotify | Wish::Nothing => traffic.queue_close_notify(space),
        };
        written.map_err(|error| match error {
            EncryptError::InsufficientSize(size) => Some(size.required_size),
            EncryptError::EncryptExhausted => None,
        })
    });
    if granted {
        Ok(())
    } else {
        Err("the keys of this connection are worn out".into())
    }
}

/// Lets `write` fill space at the end of `out`, with more space if it asks for it once.
fn append(out: &mut Vec<u8>, room: usize, mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>) -> bool {
    let start = out.len();
    let mut space = room;
    let mut outcome = Err(None);
    for _ in 0..2 {
        out.resize(start + space, 0);
        outcome = write(out.get_mut(start..).unwrap_or_default());
        match outcome {
            Err(Some(required)) => space = required,
            _ => break,
        }
    }
    out.truncate(start + outcome.unwrap_or(0));
    outcome.is_ok()
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("held", &self.held.len())
            .field("outbound", &self.outbound.len())
            .field("peer_closed", &self.peer_closed)
            .field("notified", &self.notified)
            .finish_non_exhaustive()
    }
}

/// What the TLS handshake agreed on. From [`Conn::tls`](crate::Conn::tls).
#[derive(Clone, Copy)]
pub struct TlsInfo<'a>(&'a Session);

impl<'a> TlsInfo<'a> {
    fn common(self) -> Option<&'a CommonState> {
        match &self.0.stage {
            Stage::Hello(..) => None,
            Stage::Running(connection) => Some(connection),
        }
    }

    /// The name the client asked for (SNI), lower case.
    pub fn server_name(self) -> Option<&'a str> {
        self.0.server_name.as_deref()
    }

    /// The protocol agreed on by ALPN.
    pub fn alpn(self) -> Option<&'a [u8]> {
        self.common()?.alpn_protocol()
    }

    /// The client's certificate chain, its own first. Empty unless the configuration asks for one.
    pub fn client_certificates(self) -> &'a [CertificateDer<'static>] {
        self.common()
            .and_then(CommonState::peer_certificates)
            .unwrap_or_default()
    }

    /// TLS 1.2 or 1.3.
    pub fn version(self) -> Option<ProtocolVersion> {
        self.common()?.protocol_version()
    }

    /// The cipher suite.
    pub fn cipher_suite(self) -> Option<CipherSuite> {
        Some(self.common()?.negotiated_cipher_suite()?.suite())
    }

    /// Full or resumed.
    pub fn handshake_kind(self) -> Option<HandshakeKind> {
        self.common()?.handshake_kind()
    }
}

impl fmt::Debug for TlsInfo<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsInfo")
            .field("version", &self.version())
            .field("cipher_suite", &self.cipher_suite())
            .field("server_name", &self.server_name())
            .field("alpn", &self.alpn())
            .field("client_certificates", &self.client_certificates().len())
            .finish()
    }
}

/// Why a certificate chain and key make no configuration: the file, and what is wrong with it.
#[derive(Debug)]
pub struct PemError {
    file: PathBuf,
    fault: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl PemError {
    fn new(file: &Path, fault: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            fault: fault.into(),
            source: None,
        }
    }

    fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Says nothing of what is in the file: a key without line breaks is all in one line.
    fn parsing(file: &Path, what: &str, error: pem::Error) -> Self {
        let fault = match error {
            pem::Error::Io(error) => return Self::new(file, "cannot be read").because(error),
            pem::Error::NoItemsFound => format!("holds no {what} in PEM form"),
            pem::Error::MissingSectionEnd { .. } => {
                "is cut off, or has lost its line breaks: a PEM section has no END line".to_owned()
            }
            pem::Error::Base64Decode(_) => "is damaged: a PEM section is not valid base64".to_owned(),
            _ => format!("is not a valid PEM file with a {what}"),
        };
        Self::new(file, fault)
    }

    /// An encrypted key is none to the parser, or a damaged one.
    fn parsing_key(file: &Path, error: pem::Error) -> Self {
        const MARK: &[u8] = b"ENCRYPTED";
        if fs::read(file).is_ok_and(|bytes| bytes.windows(MARK.len()).any(|window| window == MARK)) {
            return Self::new(
                file,
                "holds an encrypted private key: decrypt it first (openssl pkey -in FILE -out DECRYPTED)",
            );
        }
        Self::parsing(file, "private key", error)
    }

    /// The file that is at fault.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

impl fmt::Display for PemError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.file.display(), self.fault)?;
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl StdError for PemError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// A TLS 1.2 and 1.3 configuration from a certificate chain (the server's own certificate first)
/// and its private key, both PEM files.
///
/// Uses the provider of the feature `ring` or `aws-lc-rs`, or the process's installed default.
/// For ALPN change it: `Arc::make_mut(&mut config).alpn_protocols = vec![b"mqtt".to_vec()]`. For client certificates,
/// several names, or tickets build a [`rustls::ServerConfig`] yourself.
///
/// # Errors
///
/// A file that cannot be read, holds no certificate or key, or two that do not belong together:
/// [`PemError`] names the file and the fault.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = portcullis::tls::server_config("chain.pem", "key.pem")?;
/// let listen = portcullis::Listen::tcp("0.0.0.0:8883").tls(config);
/// # let _ = listen; Ok(()) }
/// ```
pub fn server_config(chain: impl AsRef<Path>, key: impl AsRef<Path>) -> Result<Arc<ServerConfig>, PemError> {
    let (chain_file, key_file) = (chain.as_ref(), key.as_ref());
    let chain = CertificateDer::pem_file_iter(chain_file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| PemError::parsing(chain_file, "certificate", error))?;
    if chain.is_empty() {
        return Err(PemError::parsing(chain_file, "certificate", pem::Error::NoItemsFound));
    }
    let key = PrivateKeyDer::from_pem_file(key_file).map_err(|error| PemError::parsing_key(key_file, error))?;
    let provider = provider().ok_or_else(|| {
        PemError::new(
            key_file,
            "cannot be used: no TLS provider; enable the feature `ring` or `aws-lc-rs`, or install a default provider",
        )
    })?;
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| PemError::new(key_file, "cannot be used with this TLS provider").because(error))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map(Arc::new)
        .map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => PemError::new(
                key_file,
                format!("does not belong to the first certificate in {}", chain_file.display()),
            ),
            rustls::Error::InvalidCertificate(error) => {
                PemError::new(chain_file, "begins with a certificate that is not valid").because(error.to_string())
            }
            rustls::Error::General(words) => PemError::new(key_file, "holds no key that can be used").because(words),
            error => PemError::new(key_file, "holds no key that can be used").because(error),
        })
}

/// The provider this crate was built with, or the one installed for the process.
fn provider() -> Option<Arc<CryptoProvider>> {
    if let Some(installed) = CryptoProvider::get_default() {
        return Some(Arc::clone(installed));
    }
    #[cfg(feature = "aws-lc-rs")]
    return Some(Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    #[cfg(all(feature = "ring", not(feature = "aws-lc-rs")))]
    return Some(Arc::new(rustls::crypto::ring::default_provider()));
    #[cfg(not(any(feature = "ring", feature = "aws-lc-rs")))]
    None
}

//! TLS on one connection, sans-IO: ciphertext in, plaintext out, and back. The only room that names rustls.
//!
//! Uses rustls' unbuffered connection, because an idle one costs 3.3 KB where the buffered one costs
//! 7.4 KB: buffers are ours, borrowed from the pool while a record is incomplete or unsent.

mod client;
mod config;
mod drive;
mod info;
mod pem;

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::server::{Acceptor, ClientHello, UnbufferedServerConnection};
use rustls::{AlertDescription, CommonState, ProtocolVersion, ServerConfig};

use super::pool::{retained, Pool};
use super::send_buf::SendBuffer;
pub(crate) use client::ClientTls;
use client::WithServer;
pub use config::{NameError, ServerNames, TlsConfig};
use drive::{drive, Out, Side, Wish};
pub use info::TlsInfo;
pub use pem::{client_config, server_config, server_config_with_clients, ClientAuth, PemError};

/// Ciphertext held for one connection: a handshake message of 64 KiB, rustls' own maximum, and the record it ends in.
const MAX_HELD: usize = 0x1_0000 + 0x4800;
/// Plaintext encrypted for one write: four full records.
const ENCRYPT_CHUNK: usize = 64 * 1024;
/// One connection's TLS.
pub(super) struct Session {
    stage: Stage,
    /// Incomplete records, and the records of an incomplete handshake message.
    held: Vec<u8>,
    /// Ciphertext waiting for the kernel.
    outbound: SendBuffer,
    /// How much at the front of `outbound` was sent before the upgrade to TLS, and goes in the clear.
    clear: usize,
    /// How much of `outbound` TLS says by itself: handshake, tickets, key updates.
    tls_overhead: usize,
    /// Bytes that came behind the last frame before the upgrade: not to be taken for frames.
    stash: Vec<u8>,
    /// The very first byte from the peer, which tells TLS from something else.
    first: Option<u8>,
    /// The name in the ClientHello, which rustls' unbuffered connection keeps to itself; or the one that we ask for.
    server_name: Option<Box<str>>,
    /// The one that was chosen.
    config: Option<Arc<ServerConfig>>,
    peer_closed: bool,
    notified: bool,
    failure: Failure,
}

/// Whether this session has failed, and with what until somebody took it.
enum Failure {
    None,
    New(Box<dyn StdError + Send + Sync>),
    Told,
}

#[allow(clippy::large_enum_variant)] // a session is boxed already, and spends its life in the large one
enum Stage {
    /// The ClientHello is read from a copy: only `Acceptor` shows it.
    Hello(Box<Acceptor>, TlsConfig),
    /// rustls at work.
    Running(UnbufferedServerConnection),
    /// The same, towards a server.
    Client(UnbufferedClientConnection),
}

impl Session {
    pub(super) fn new(config: &TlsConfig) -> Self {
        Self::at(Stage::Hello(Box::default(), config.clone()))
    }

    fn at(stage: Stage) -> Self {
        Self {
            stage,
            held: Vec::new(),
            outbound: SendBuffer::default(),
            clear: 0,
            tls_overhead: 0,
            stash: Vec::new(),
            first: None,
            server_name: None,
            config: None,
            peer_closed: false,
            notified: false,
            failure: Failure::None,
        }
    }

    /// For a connection that was open in the clear: behind what was sent before and has not gone yet.
    pub(super) fn behind(config: &TlsConfig, sent: SendBuffer) -> Self {
        Self {
            clear: sent.len(),
            outbound: sent,
            ..Self::new(config)
        }
    }

    /// Towards a server, behind what was sent before: says hello.
    pub(super) fn client(
        config: &ClientTls,
        sent: SendBuffer,
        pool: &mut Pool,
    ) -> Result<Self, Box<dyn StdError + Send + Sync>> {
        let mut session = Self {
            clear: sent.len(),
            outbound: sent,
            server_name: Some(config.wanted()),
            ..Self::at(Stage::Client(config.connection()?))
        };
        session.wish(Wish::Nothing, pool)?;
        Ok(session)
    }

    /// Keeps bytes that came before there was a session, for [`Session::take_stash`].
    pub(super) fn stash(&mut self, wire: &[u8], pool: &mut Pool) {
        if self.stash.capacity() == 0 {
            self.stash = pool.take();
        }
        self.stash.extend_from_slice(wire);
    }

    pub(super) fn has_stash(&self) -> bool {
        !self.stash.is_empty()
    }

    pub(super) fn take_stash(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.stash)
    }

    /// Nothing more can be decrypted or encrypted.
    pub(super) fn has_failed(&self) -> bool {
        !matches!(self.failure, Failure::None)
    }

    /// The failure, once.
    pub(super) fn take_failure(&mut self) -> Option<Box<dyn StdError + Send + Sync>> {
        if !self.has_failed() {
            return None;
        }
        match std::mem::replace(&mut self.failure, Failure::Told) {
            Failure::New(error) => Some(error),
            Failure::Told | Failure::None => None,
        }
    }

    pub(super) fn is_handshaking(&self) -> bool {
        self.common().is_none_or(CommonState::is_handshaking)
    }

    /// What rustls knows, once it is at work.
    fn common(&self) -> Option<&CommonState> {
        match &self.stage {
            Stage::Hello(..) => None,
            Stage::Running(connection) => Some(connection.common()),
            Stage::Client(connection) => Some(connection.common()),
        }
    }

    /// We are the client.
    fn is_client(&self) -> bool {
        matches!(self.stage, Stage::Client(_))
    }

    /// close_notify is said, or never will be.
    pub(super) fn has_said_goodbye(&self) -> bool {
        self.notified
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
            self.failure = Failure::New(match &self.server_name {
                Some(wanted) if self.is_client() && self.is_handshaking() => Box::new(WithServer {
                    wanted: wanted.clone(),
                    source: error,
                }),
                _ => error,
            });
        }
    }

    fn decrypt(
        &mut self,
        wire: &mut [u8],
        plain: &mut Vec<u8>,
        pool: &mut Pool,
    ) -> Result<(), Box<dyn StdError + Send + Sync>> {
        self.first = self.first.or_else(|| wire.first().copied());
        if let Stage::Hello(acceptor, config) = &mut self.stage {
            let before = self.outbound.len();
            let greeted = read_hello(acceptor, config, wire, self.outbound.tail(pool));
            self.tls_overhead += self.outbound.len() - before;
            if self.outbound.is_empty() {
                self.outbound.clear(pool);
            }
            if let Some(Greeted { server_name, config }) = greeted? {
                self.server_name = server_name;
                self.stage = Stage::Running(UnbufferedServerConnection::new(Arc::clone(&config))?);
                self.config = Some(config);
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

    /// Encrypts the front of `plain` if no ciphertext waits but what TLS says by itself, in front of which there may be what was
    /// sent before an upgrade; returns how much of it was taken.
    pub(super) fn encrypt(&mut self, plain: &[u8], pool: &mut Pool) -> Result<usize, Box<dyn StdError + Send + Sync>> {
        let encrypted = self.outbound.len().saturating_sub(self.clear + self.tls_overhead);
        if plain.is_empty() || encrypted > 0 || self.notified || self.is_handshaking() {
            return Ok(0);
        }
        let chunk = plain.get(..ENCRYPT_CHUNK).unwrap_or(plain);
        self.wish(Wish::Encrypt(chunk), pool)?;
        Ok(chunk.len())
    }

    /// Queues close_notify behind what waits, once. Nothing can be said before the handshake is done.
    pub(super) fn close_notify(&mut self, pool: &mut Pool) -> Result<(), Box<dyn StdError + Send + Sync>> {
        if self.notified || self.is_handshaking() || self.has_failed() {
            return Ok(());
        }
        self.notified = true;
        self.wish(Wish::CloseNotify, pool)
    }

    pub(super) fn waiting(&self) -> &[u8] {
        self.outbound.waiting()
    }

    /// Nothing waits in either direction.
    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        self.held.is_empty() && self.outbound.is_empty()
    }

    /// Of what waits: bytes that no handler has sent. They come first, all but the answer to a key update.
    pub(super) fn tls_overhead(&self) -> usize {
        self.tls_overhead
    }

    #[inline]
    pub(super) fn advance(&mut self, count: usize) {
        self.outbound.advance(count);
        let clear = count.min(self.clear);
        self.clear -= clear;
        self.tls_overhead = self.tls_overhead.saturating_sub(count - clear);
    }

    /// Bytes of ciphertext held in either direction.
    pub(super) fn buffered(&self) -> usize {
        self.held.len() + self.stash.len() + self.outbound.len()
    }

    /// Memory that its buffers take; what rustls keeps of an incomplete ClientHello is another copy of it.
    pub(super) fn memory(&self) -> usize {
        let copies = if matches!(self.stage, Stage::Hello(..)) { 2 } else { 1 };
        retained(&self.held) * copies + retained(&self.stash) + self.outbound.retained()
    }

    pub(super) fn shrink(&mut self, pool: &mut Pool) {
        pool.shrink(&mut self.held);
        self.outbound.shrink(pool);
    }

    #[cfg(feature = "sim")]
    pub(super) fn is_compact(&self) -> bool {
        self.outbound.is_compact()
    }

    /// Drops what waits to be sent.
    pub(super) fn silence(&mut self, pool: &mut Pool) {
        self.outbound.clear(pool);
        self.clear = 0;
        self.tls_overhead = 0;
    }

    /// Gives back what is held, for a connection that is over.
    pub(super) fn clear(&mut self, pool: &mut Pool) {
        pool.give(std::mem::take(&mut self.held));
        pool.give(std::mem::take(&mut self.stash));
        self.silence(pool);
    }

    fn wish(&mut self, wish: Wish<'_>, pool: &mut Pool) -> Result<(), Box<dyn StdError + Send + Sync>> {
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
        wish: Wish<'_>,
        pool: &mut Pool,
    ) -> Result<usize, Box<dyn StdError + Send + Sync>> {
        let Self {
            stage,
            outbound,
            tls_overhead,
            peer_closed,
            ..
        } = self;
        let out = Out {
            outbound,
            tls_overhead,
            peer_closed,
        };
        match stage {
            Stage::Hello(..) => Ok(0),
            Stage::Running(connection) => drive(connection, out, input, plain, wish, pool),
            Stage::Client(connection) => drive(connection, out, input, plain, wish, pool),
        }
    }

    pub(super) fn info(&self) -> TlsInfo<'_> {
        TlsInfo(self)
    }
}

/// What a ClientHello has led to.
struct Greeted {
    server_name: Option<Box<str>>,
    config: Arc<ServerConfig>,
}

/// Looks for the ClientHello, and chooses by it once it is whole. The alert for a bad one is put into `alert`.
fn read_hello(
    acceptor: &mut Acceptor,
    config: &TlsConfig,
    mut wire: &[u8],
    alert: &mut Vec<u8>,
) -> Result<Option<Greeted>, Box<dyn StdError + Send + Sync>> {
    while !wire.is_empty() {
        acceptor.read_tls(&mut wire)?;
        match acceptor.accept() {
            Ok(Some(accepted)) => return choose(config, &accepted.client_hello(), alert).map(Some),
            Ok(None) => {}
            Err((error, mut last_words)) => {
                last_words.write_all(alert)?;
                return Err(error.into());
            }
        }
    }
    Ok(None)
}

fn choose(
    config: &TlsConfig,
    hello: &ClientHello<'_>,
    alert: &mut Vec<u8>,
) -> Result<Greeted, Box<dyn StdError + Send + Sync>> {
    let server_name = hello.server_name();
    let Some(config) = config.for_client(hello) else {
        let (description, words) = match server_name {
            Some(name) => (
                AlertDescription::UnrecognisedName,
                format!("no configuration for the name {name:?}"),
            ),
            None => (
                AlertDescription::MissingExtension,
                "the client asks for no name, and there is no configuration for that".to_owned(),
            ),
        };
        // A fatal alert in a record of its own (RFC 8446 sections 5.1 and 6), in the clear as all before ServerHello.
        alert.extend_from_slice(&[21, 3, 3, 0, 2, 2, description.into()]);
        return Err(words.into());
    };
    Ok(Greeted {
        server_name: server_name.map(Box::from),
        config,
    })
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

//! One connection's TLS session: what the machine asks of TLS, and nothing else.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::server::{Acceptor, ClientHello, UnbufferedServerConnection};
use rustls::{AlertDescription, CommonState, ContentType, ProtocolVersion, ServerConfig};

use super::client::{ClientTls, WithServer};
use super::config::TlsConfig;
use super::drive::{drive, Out, Side, Wish, MAX_PAYLOAD};
use crate::catch::catch;
use crate::proto::buffers::{retained, Buffers, Ciphertext, SendBuffer};
use crate::proto::send_queue::first_two;

type Failed = Box<dyn StdError + Send + Sync>;

/// Ciphertext buffered for one connection: a handshake message of 64 KiB, rustls' own maximum, and
/// the record that it ends in.
const MAX_BUFFERED: usize = 0x1_0000 + 0x4800;
/// Plaintext encrypted for one write: four full records.
const ENCRYPT_CHUNK: usize = 64 * 1024;

/// One connection's TLS, on either side.
///
/// Ciphertext in, plaintext out, and back. Uses rustls' unbuffered connection, because an idle one
/// costs 3.3 KB where the buffered one costs 7.4 KB. The [`Ciphertext`] is ours, borrowed from the
/// pool while a record is incomplete or unsent.
pub(in crate::proto) struct Session {
    stage: Stage,
    ciphertext: Option<Box<Ciphertext>>,
    /// The first byte from the peer, which distinguishes TLS from other protocols.
    first: Option<u8>,
    /// The name in the ClientHello, which rustls' unbuffered connection does not expose; or, on the
    /// client's side, the server's.
    server_name: Option<Box<str>>,
    /// The configuration chosen for the client.
    config: Option<Arc<ServerConfig>>,
    peer_closed: bool,
    /// close_notify is sent, or is never to be.
    notified: bool,
    has_failed: bool,
    /// Why it has failed, until the error is taken.
    failure: Option<Failed>,
}

// A session is boxed already, and is nearly always in a large variant.
#[allow(clippy::large_enum_variant)]
enum Stage {
    /// The ClientHello is read from a copy: only `Acceptor` exposes it.
    Hello(Box<Acceptor>, TlsConfig),
    /// The server's side.
    Server(UnbufferedServerConnection),
    /// The client's side.
    Client(UnbufferedClientConnection),
}

impl Stage {
    #[inline(always)]
    fn drive(
        &mut self,
        out: Out<'_>,
        input: &mut [u8],
        plain: &mut Vec<u8>,
        wish: Wish<'_>,
        buffers: &mut Buffers,
    ) -> Result<usize, Failed> {
        match self {
            Self::Hello(..) => Ok(0),
            Self::Server(connection) => drive(connection, out, input, plain, wish, buffers),
            Self::Client(connection) => drive(connection, out, input, plain, wish, buffers),
        }
    }
}

impl Session {
    pub(in crate::proto) fn new(config: &TlsConfig) -> Self {
        Self::at(Stage::Hello(Box::default(), config.clone()))
    }

    fn at(stage: Stage) -> Self {
        Self {
            stage,
            ciphertext: None,
            first: None,
            server_name: None,
            config: None,
            peer_closed: false,
            notified: false,
            has_failed: false,
            failure: None,
        }
    }

    /// For a connection that was open in the clear: behind the pending output from before.
    pub(in crate::proto) fn behind(config: &TlsConfig, sent: SendBuffer) -> Self {
        Self {
            ciphertext: behind(sent),
            ..Self::new(config)
        }
    }

    /// For the client's side, behind pending output from before: sends the ClientHello.
    pub(in crate::proto) fn client(
        config: &ClientTls,
        sent: SendBuffer,
        buffers: &mut Buffers,
    ) -> Result<Self, Failed> {
        let mut session = Self {
            ciphertext: behind(sent),
            server_name: Some(config.server()),
            ..Self::at(Stage::Client(config.connection()?))
        };
        session.wish(Wish::Nothing, buffers)?;
        Ok(session)
    }

    /// True if nothing more can be decrypted or encrypted.
    pub(in crate::proto) fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// Takes the failure, once.
    pub(in crate::proto) fn take_failure(&mut self) -> Option<Failed> {
        self.failure.take()
    }

    pub(in crate::proto) fn is_handshaking(&self) -> bool {
        self.common().is_none_or(CommonState::is_handshaking)
    }

    /// Returns rustls' state, once the ClientHello is read.
    pub(super) fn common(&self) -> Option<&CommonState> {
        match &self.stage {
            Stage::Hello(..) => None,
            Stage::Server(connection) => Some(connection.common()),
            Stage::Client(connection) => Some(connection.common()),
        }
    }

    pub(super) fn config(&self) -> Option<&Arc<ServerConfig>> {
        self.config.as_ref()
    }

    pub(super) fn server_name(&self) -> Option<&str> {
        self.server_name.as_deref()
    }

    /// True on the client's side.
    pub(super) fn is_client(&self) -> bool {
        matches!(self.stage, Stage::Client(_))
    }

    /// True if close_notify is sent, or is never to be.
    pub(in crate::proto) fn has_said_goodbye(&self) -> bool {
        self.notified
    }

    /// True if the peer's close_notify has come: nothing follows.
    pub(in crate::proto) fn peer_closed(&self) -> bool {
        self.peer_closed
    }

    /// True if nothing more can be decrypted.
    pub(in crate::proto) fn has_ended(&self) -> bool {
        self.peer_closed || self.has_failed()
    }

    /// True if the first byte begins no TLS record (types 20 to 24, RFC 8446 section 5.1), and no
    /// SSLv2 hello.
    pub(in crate::proto) fn is_not_tls(&self) -> bool {
        self.first
            .is_some_and(|byte| !(20..=24).contains(&byte) && byte & 0x80 == 0)
    }

    /// True if the peer's close_notify ends both directions.
    ///
    /// TLS 1.2 answers it at once and discards pending output (RFC 5246 section 7.2.1); 1.3 may go
    /// on writing.
    pub(in crate::proto) fn closes_both_ways(&self) -> bool {
        let version = self.common().and_then(CommonState::protocol_version);
        version == Some(ProtocolVersion::TLSv1_2)
    }

    /// Returns how many bytes of an incomplete record or handshake message have arrived.
    pub(in crate::proto) fn begun_bytes(&self) -> usize {
        self.ciphertext().recv_buf.len()
    }

    #[inline]
    fn ciphertext(&self) -> &Ciphertext {
        self.ciphertext.as_deref().unwrap_or(Ciphertext::IDLE)
    }

    /// Decrypts `wire` and appends the plaintext to `plain`. After a failure the alert for the peer
    /// is [`Session::pending`].
    pub(in crate::proto) fn receive(
        &mut self,
        wire: &mut [u8],
        plain: &mut Vec<u8>,
        buffers: &mut Buffers,
    ) {
        if self.has_ended() {
            return;
        }
        if let Err(error) = self.decrypt(wire, plain, buffers) {
            if let Some(ciphertext) = &mut self.ciphertext {
                buffers.give(std::mem::take(&mut ciphertext.recv_buf));
            }
            self.has_failed = true;
            self.failure = Some(match &self.server_name {
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
        buffers: &mut Buffers,
    ) -> Result<(), Failed> {
        self.first = self.first.or_else(|| wire.first().copied());
        if let Stage::Hello(acceptor, config) = &mut self.stage {
            let Ciphertext {
                send_buf, overhead, ..
            } = &mut **self
                .ciphertext
                .get_or_insert_with(|| buffers.take_ciphertext());
            let before = send_buf.len();
            let greeted = read_hello(acceptor, config, wire, send_buf.tail(buffers));
            *overhead += send_buf.len() - before;
            if send_buf.is_empty() {
                send_buf.clear(buffers);
            }
            if let Some(Greeted {
                server_name,
                config,
            }) = greeted?
            {
                self.server_name = server_name;
                self.stage = Stage::Server(UnbufferedServerConnection::new(Arc::clone(&config))?);
                self.config = Some(config);
            }
        }
        if self.begun_bytes() == 0 {
            let consumed = self.pump(wire, plain, Wish::Nothing, buffers)?;
            let rest = wire.get(consumed..).unwrap_or_default();
            if rest.is_empty() || self.peer_closed {
                return Ok(());
            }
            let mut input = buffers.take();
            input.extend_from_slice(rest);
            return self.buffer_input(input, buffers);
        }
        let mut input = self.take_input();
        input.extend_from_slice(wire);
        match self.pump(&mut input, plain, Wish::Nothing, buffers) {
            Ok(consumed) if consumed < input.len() && !self.peer_closed => {
                input.drain(..consumed);
                self.buffer_input(input, buffers)
            }
            outcome => {
                buffers.give(input);
                outcome.map(drop)
            }
        }
    }

    /// Buffers an incomplete record or handshake message, unless it is too large.
    fn buffer_input(&mut self, input: Vec<u8>, buffers: &mut Buffers) -> Result<(), Failed> {
        let is_too_large = input.len() > MAX_BUFFERED;
        self.keep_input(input, buffers);
        if is_too_large {
            return Err("a handshake message or record is too large".into());
        }
        Ok(())
    }

    #[inline]
    fn take_input(&mut self) -> Vec<u8> {
        self.ciphertext
            .as_mut()
            .map(|ciphertext| std::mem::take(&mut ciphertext.recv_buf))
            .unwrap_or_default()
    }

    /// What is left of the input waits for more.
    #[inline]
    fn keep_input(&mut self, input: Vec<u8>, buffers: &mut Buffers) {
        if input.is_empty() {
            buffers.give(input);
        } else {
            self.ciphertext
                .get_or_insert_with(|| buffers.take_ciphertext())
                .recv_buf = input;
        }
    }

    /// Encrypts the front of `plain`, in two pieces, unless ciphertext of earlier plaintext is
    /// pending.
    ///
    /// Returns how many bytes of `plain` were encrypted. TLS's own bytes may be pending, and bytes
    /// from before an upgrade.
    #[inline]
    pub(in crate::proto) fn encrypt(
        &mut self,
        plain: [&[u8]; 2],
        buffers: &mut Buffers,
    ) -> Result<usize, Failed> {
        if plain.iter().all(|piece| piece.is_empty()) || !self.can_encrypt() {
            return Ok(0);
        }
        let mut room = ENCRYPT_CHUNK;
        let chunks = plain.map(|piece| {
            let chunk = piece.get(..room).unwrap_or(piece);
            room -= chunk.len();
            chunk
        });
        let before = self.ciphertext().overhead;
        if let Err(error) = self.wish(Wish::Encrypt(chunks), buffers) {
            // Worn out keys: close_notify is in the buffer, behind the last encrypted record.
            self.notified = true;
            if let Some(ciphertext) = &mut self.ciphertext {
                ciphertext.goodbye = ciphertext.overhead - before;
                ciphertext.overhead = before;
            }
            return Err(error);
        }
        Ok(ENCRYPT_CHUNK - room)
    }

    /// As [`Session::encrypt`], for output in several pieces. Short ones are copied into one
    /// record: rustls encrypts from one piece.
    pub(in crate::proto) fn encrypt_pieces<'a>(
        &mut self,
        plain: impl Iterator<Item = &'a [u8]>,
        buffers: &mut Buffers,
    ) -> Result<usize, Failed> {
        if !self.can_encrypt() {
            return Ok(0);
        }
        let mut joint = buffers.take();
        let encrypted = self.encrypt(first_two(plain, &mut joint, MAX_PAYLOAD), buffers);
        buffers.give(joint);
        encrypted
    }

    /// True if plaintext can be encrypted, and no ciphertext of earlier plaintext is pending.
    #[inline]
    fn can_encrypt(&self) -> bool {
        let ciphertext = self.ciphertext();
        let encrypted = ciphertext
            .send_buf
            .len()
            .saturating_sub(ciphertext.clear + ciphertext.overhead);
        encrypted == 0 && !self.notified && !self.is_handshaking()
    }

    /// Queues close_notify behind pending ciphertext, once. Does nothing before the handshake is
    /// over.
    pub(in crate::proto) fn close_notify(&mut self, buffers: &mut Buffers) -> Result<(), Failed> {
        if self.notified || self.is_handshaking() || self.has_failed() {
            return Ok(());
        }
        let before = self.pending().len();
        let outcome = self.wish(Wish::CloseNotify, buffers);
        self.notified = true;
        if let Some(ciphertext) = &mut self.ciphertext {
            ciphertext.goodbye = ciphertext.send_buf.len().saturating_sub(before);
        }
        outcome
    }

    pub(in crate::proto) fn pending(&self) -> &[u8] {
        self.ciphertext().send_buf.pending()
    }

    /// True if nothing is buffered in either direction.
    #[inline]
    pub(in crate::proto) fn is_idle(&self) -> bool {
        self.ciphertext
            .as_ref()
            .is_none_or(|ciphertext| ciphertext.is_empty())
    }

    /// Returns how many pending bytes are ciphertext of the application's.
    #[inline]
    pub(in crate::proto) fn pending_app_bytes(&self) -> usize {
        self.pending().len().saturating_sub(self.tls_overhead())
    }

    /// Returns how many pending bytes are TLS's own. They come first, but for the answer to a key
    /// update, and close_notify comes last.
    pub(in crate::proto) fn tls_overhead(&self) -> usize {
        let ciphertext = self.ciphertext();
        ciphertext.overhead + ciphertext.goodbye.min(ciphertext.send_buf.len())
    }

    #[inline]
    pub(in crate::proto) fn advance(&mut self, count: usize) {
        let Some(ciphertext) = &mut self.ciphertext else {
            return;
        };
        ciphertext.send_buf.advance(count);
        let clear = count.min(ciphertext.clear);
        ciphertext.clear -= clear;
        ciphertext.overhead = ciphertext.overhead.saturating_sub(count - clear);
    }

    /// Returns the bytes of ciphertext buffered in either direction.
    pub(in crate::proto) fn buffered(&self) -> usize {
        let ciphertext = self.ciphertext();
        ciphertext.recv_buf.len() + ciphertext.send_buf.len()
    }

    /// Returns the memory of its buffers, and that of the peer's certificates. rustls keeps another
    /// copy of an incomplete ClientHello.
    pub(in crate::proto) fn memory(&self) -> (usize, usize) {
        let copies = if matches!(self.stage, Stage::Hello(..)) {
            2
        } else {
            1
        };
        let ciphertext = self.ciphertext();
        let buffers = retained(&ciphertext.recv_buf) * copies + ciphertext.send_buf.memory();
        (buffers, self.peer_chain())
    }

    fn peer_chain(&self) -> usize {
        let chain = self.common().and_then(CommonState::peer_certificates);
        chain.map_or(0, |chain| {
            chain.iter().map(|certificate| certificate.len()).sum()
        })
    }

    pub(in crate::proto) fn shrink(&mut self, buffers: &mut Buffers) {
        if self.is_idle() {
            self.clear(buffers);
        } else if let Some(ciphertext) = &mut self.ciphertext {
            buffers.shrink(&mut ciphertext.recv_buf);
            ciphertext.send_buf.shrink(buffers);
        }
    }

    #[cfg(feature = "sim")]
    pub(in crate::proto) fn is_compact(&self) -> bool {
        self.ciphertext().send_buf.is_compact()
    }

    /// Drops pending ciphertext.
    pub(in crate::proto) fn silence(&mut self, buffers: &mut Buffers) {
        if let Some(ciphertext) = &mut self.ciphertext {
            ciphertext.send_buf.clear(buffers);
            ciphertext.clear = 0;
            ciphertext.overhead = 0;
        }
    }

    /// Gives the buffers back: the connection is over, or idle.
    #[inline]
    pub(in crate::proto) fn clear(&mut self, buffers: &mut Buffers) {
        if let Some(ciphertext) = self.ciphertext.take() {
            buffers.give_ciphertext(ciphertext);
        }
    }

    fn wish(&mut self, wish: Wish<'_>, buffers: &mut Buffers) -> Result<(), Failed> {
        if self.begun_bytes() == 0 {
            let outcome = self.pump(&mut [], &mut Vec::new(), wish, buffers);
            return outcome.map(drop);
        }
        // rustls may keep ranges of an incomplete handshake message: it must see the same bytes
        // again.
        let mut input = self.take_input();
        let mut plain = Vec::new();
        let outcome = self.pump(&mut input, &mut plain, wish, buffers);
        debug_assert!(plain.is_empty(), "receive leaves no whole record behind");
        if let Ok(consumed) = outcome {
            input.drain(..consumed.min(input.len()));
        }
        self.keep_input(input, buffers);
        outcome.map(drop)
    }

    /// Drives rustls until it needs more input; returns how many bytes of `input` it is done with.
    /// The only place that drives it: after an error it is never driven again.
    fn pump(
        &mut self,
        input: &mut [u8],
        plain: &mut Vec<u8>,
        wish: Wish<'_>,
        buffers: &mut Buffers,
    ) -> Result<usize, Failed> {
        // After a fatal alert rustls must not be driven again (RFC 8446 section 6.2).
        if self.has_failed() {
            return Err("TLS has failed".into());
        }
        let Self {
            stage,
            ciphertext,
            peer_closed,
            notified,
            ..
        } = self;
        let ciphertext = ciphertext.get_or_insert_with(|| buffers.take_ciphertext());
        let out = Out {
            send_buf: &mut ciphertext.send_buf,
            overhead: &mut ciphertext.overhead,
            peer_closed,
        };
        let outcome = if matches!(wish, Wish::Nothing) && !*notified {
            // Where input is read, panics are caught.
            stage.drive(out, input, plain, Wish::Nothing, buffers)
        } else {
            // rustls unwraps what a cipher of the provider returns.
            let caught = catch(|| stage.drive(out, input, plain, wish, buffers));
            caught.unwrap_or_else(|panic| match *notified {
                // rustls takes close_notify for its last alert, and asserts in debug builds that an
                // error finds it unsent.
                true => Err("TLS failed behind our close_notify".into()),
                false => Err(panic.into()),
            })
        };
        if outcome.is_err() {
            self.has_failed = true;
        }
        outcome
    }
}

/// Pending output from before the session, which comes first.
fn behind(sent: SendBuffer) -> Option<Box<Ciphertext>> {
    (!sent.is_empty()).then(|| {
        Box::new(Ciphertext {
            clear: sent.len(),
            send_buf: sent,
            ..Ciphertext::NONE
        })
    })
}

/// The outcome of a ClientHello.
struct Greeted {
    server_name: Option<Box<str>>,
    config: Arc<ServerConfig>,
}

/// Reads the ClientHello, and chooses the configuration once it is complete. The alert for a bad
/// one is appended to `alert`.
fn read_hello(
    acceptor: &mut Acceptor,
    config: &TlsConfig,
    mut wire: &[u8],
    alert: &mut Vec<u8>,
) -> Result<Option<Greeted>, Failed> {
    while !wire.is_empty() {
        acceptor.read_tls(&mut wire)?;
        match acceptor.accept() {
            Ok(Some(accepted)) => return choose(config, &accepted.client_hello(), alert).map(Some),
            Ok(None) => {}
            Err((error, mut farewell)) => {
                let before = alert.len();
                farewell.write_all(alert)?;
                if alert.len() == before && is_unexpected(&error) {
                    alert.extend_from_slice(&fatal_alert(AlertDescription::UnexpectedMessage));
                }
                return Err(error.into());
            }
        }
    }
    Ok(None)
}

/// True if rustls' connection would send `unexpected_message`, which `Acceptor` does not: the first
/// message is no ClientHello. An alert is not answered.
fn is_unexpected(error: &rustls::Error) -> bool {
    match error {
        rustls::Error::InappropriateMessage { got_type, .. } => *got_type != ContentType::Alert,
        rustls::Error::InappropriateHandshakeMessage { .. } => true,
        _ => false,
    }
}

/// A fatal alert in a record of its own (RFC 8446 sections 5.1 and 6), in the clear like everything
/// before ServerHello.
fn fatal_alert(description: AlertDescription) -> [u8; 7] {
    [21, 3, 3, 0, 2, 2, description.into()]
}

fn choose(
    config: &TlsConfig,
    hello: &ClientHello<'_>,
    alert: &mut Vec<u8>,
) -> Result<Greeted, Failed> {
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
        alert.extend_from_slice(&fatal_alert(description));
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
            .field("recv_buf", &self.begun_bytes())
            .field("send_buf", &self.pending().len())
            .field("peer_closed", &self.peer_closed)
            .field("notified", &self.notified)
            .finish_non_exhaustive()
    }
}

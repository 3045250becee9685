//! The loop around rustls, for servers and clients.

use std::error::Error as StdError;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic,
};
use rustls::CommonState;

use crate::proto::buffers::{Buffers, SendBuffer};

/// The most that a record adds to its plaintext: header, TLS 1.2 nonce, content type and tag,
/// rounded up.
const MAX_OVERHEAD: usize = 64;
/// The most plaintext of a record.
pub(super) const MAX_PAYLOAD: usize = 16 * 1024;

/// What rustls has twice: for servers and for clients.
pub(super) trait Side {
    type Data;

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn common(&self) -> &CommonState;
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(input)
    }

    fn common(&self) -> &CommonState {
        self
    }
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(input)
    }

    fn common(&self) -> &CommonState {
        self
    }
}

/// What to do once rustls has nothing left to send by itself.
pub(super) enum Wish<'a> {
    Nothing,
    Encrypt([&'a [u8]; 2]),
    CloseNotify,
}

/// The parts of a session that [`drive`] changes.
pub(super) struct Out<'a> {
    pub(super) send_buf: &'a mut SendBuffer,
    pub(super) overhead: &'a mut usize,
    pub(super) peer_closed: &'a mut bool,
}

/// Drives rustls until it needs more input; returns how many bytes of `input` it is done with.
pub(super) fn drive<S: Side>(
    connection: &mut S,
    out: Out<'_>,
    input: &mut [u8],
    plain: &mut Vec<u8>,
    mut wish: Wish<'_>,
    buffers: &mut Buffers,
) -> Result<usize, Box<dyn StdError + Send + Sync>> {
    let Out {
        send_buf,
        overhead,
        peer_closed,
    } = out;
    let mut consumed = 0;
    let (mut failure, mut worn_out) = (None, false);
    loop {
        let unread = input.get_mut(consumed..).unwrap_or_default();
        let UnbufferedStatus { mut discard, state } = connection.process(unread);
        // Whether to go on, or only if rustls has something to send.
        let (mut more, mut silent) = (true, false);
        match state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    let record = record?;
                    discard += record.discard;
                    plain.extend_from_slice(record.payload);
                }
                silent = consumed + discard == input.len() && matches!(wish, Wish::Nothing);
            }
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                let before = send_buf.len();
                // rustls reports the length when it is refused.
                append(send_buf.tail(buffers), 0, |space| {
                    match data.encode(space) {
                        Ok(written) => Ok(written),
                        Err(EncodeError::InsufficientSize(size)) => Err(Some(size.required_size)),
                        Err(EncodeError::AlreadyEncoded) => Err(None),
                    }
                });
                *overhead += send_buf.len() - before;
            }
            Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
            Ok(ConnectionState::PeerClosed) => *peer_closed = true,
            Ok(ConnectionState::WriteTraffic(traffic)) => {
                match std::mem::replace(&mut wish, Wish::Nothing) {
                    Wish::Nothing => more = false,
                    wish => {
                        if !grant(traffic, wish, send_buf.tail(buffers)) {
                            // rustls has queued close_notify, which it hands over next.
                            worn_out = true;
                        }
                        silent = true;
                    }
                }
            }
            Err(error) if failure.is_none() => failure = Some(error),
            Ok(_) | Err(_) => more = false,
        }
        consumed += discard;
        if silent {
            more = connection.common().wants_write();
        }
        // After an error rustls hands over its alert for the peer. After that it would process the
        // same bytes again.
        if !more || (failure.is_some() && !connection.common().wants_write()) {
            break;
        }
    }
    if send_buf.is_empty() {
        send_buf.clear(buffers);
    }
    match (failure, wish) {
        (Some(error), _) => Err(error.into()),
        (None, _) if worn_out => Err("the keys of this connection are worn out".into()),
        (None, Wish::Encrypt(_)) => Err("TLS takes no more data".into()),
        (None, _) => Ok(consumed),
    }
}

/// Encrypts, or appends close_notify, at the end of `out`. False if the keys are worn out before
/// the last record: TLS 1.2 cannot change them (RFC 8446 section 5.5).
fn grant<Data>(mut traffic: WriteTraffic<'_, Data>, wish: Wish<'_>, out: &mut Vec<u8>) -> bool {
    let required = |error| match error {
        EncryptError::InsufficientSize(size) => Some(size.required_size),
        EncryptError::EncryptExhausted => None,
    };
    match wish {
        Wish::Encrypt(plain) => {
            let room =
                |piece: &[u8]| piece.len() + piece.len().div_ceil(MAX_PAYLOAD) * MAX_OVERHEAD;
            out.reserve(plain.into_iter().map(room).sum());
            // One record at a time: rustls refuses several as a whole if the keys allow only some.
            let mut encrypt = |record: &[u8]| {
                append(out, record.len() + MAX_OVERHEAD, |space| {
                    traffic.encrypt(record, space).map_err(required)
                })
            };
            let mut all = |piece: &[u8]| piece.chunks(MAX_PAYLOAD).all(&mut encrypt);
            plain.into_iter().all(&mut all)
        }
        Wish::CloseNotify | Wish::Nothing => append(out, MAX_OVERHEAD, |space| {
            traffic.queue_close_notify(space).map_err(required)
        }),
    }
}

/// Space at the end of a buffer, of which only what was written stays: nothing if a cipher panics.
struct Space<'a> {
    buffer: &'a mut Vec<u8>,
    start: usize,
    written: usize,
}

impl<'a> Space<'a> {
    fn behind(buffer: &'a mut Vec<u8>) -> Self {
        let start = buffer.len();
        Self {
            buffer,
            start,
            written: 0,
        }
    }

    fn of(&mut self, length: usize) -> &mut [u8] {
        self.buffer.resize(self.start + length, 0);
        self.buffer.get_mut(self.start..).unwrap_or_default()
    }
}

impl Drop for Space<'_> {
    fn drop(&mut self) {
        self.buffer.truncate(self.start + self.written);
    }
}

/// Lets `write` fill space at the end of `out`, and once more with the space that it demands.
fn append(
    out: &mut Vec<u8>,
    room: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>,
) -> bool {
    let mut space = Space::behind(out);
    let mut outcome = write(space.of(room));
    if let Err(Some(required)) = outcome {
        outcome = write(space.of(required));
    }
    space.written = outcome.unwrap_or(0);
    outcome.is_ok()
}

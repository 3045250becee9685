//! Stands in for TLS without the feature `tls`: a session that cannot exist.

use std::error::Error as StdError;

use super::buffers::{Buffers, SendBuffer};

#[derive(Debug)]
pub(super) enum Session {}

/// Has no value: a listener cannot ask for TLS.
#[derive(Clone, Debug)]
pub(crate) enum TlsConfig {}

/// Has no value: an outgoing connection cannot ask for TLS.
#[derive(Clone, Debug)]
pub(crate) enum ClientTls {}

impl ClientTls {
    pub(crate) fn problem(&self) -> Option<String> {
        match *self {}
    }
}

impl Session {
    pub(super) fn client(
        config: &ClientTls,
        _sent: SendBuffer,
        _buffers: &mut Buffers,
    ) -> Result<Self, Box<dyn StdError + Send + Sync>> {
        match *config {}
    }

    pub(super) fn has_said_goodbye(&self) -> bool {
        match *self {}
    }

    pub(super) fn new(config: &TlsConfig) -> Self {
        match *config {}
    }

    pub(super) fn is_handshaking(&self) -> bool {
        match *self {}
    }

    pub(super) fn is_idle(&self) -> bool {
        match *self {}
    }

    pub(super) fn begun_bytes(&self) -> usize {
        match *self {}
    }

    pub(super) fn peer_closed(&self) -> bool {
        match *self {}
    }

    pub(super) fn has_ended(&self) -> bool {
        match *self {}
    }

    pub(super) fn is_not_tls(&self) -> bool {
        match *self {}
    }

    pub(super) fn closes_both_ways(&self) -> bool {
        match *self {}
    }

    pub(super) fn has_failed(&self) -> bool {
        match *self {}
    }

    pub(super) fn take_failure(&mut self) -> Option<Box<dyn StdError + Send + Sync>> {
        match *self {}
    }

    pub(super) fn receive(
        &mut self,
        _wire: &mut [u8],
        _plain: &mut Vec<u8>,
        _buffers: &mut Buffers,
    ) {
        match *self {}
    }

    pub(super) fn encrypt(
        &mut self,
        _plain: [&[u8]; 2],
        _buffers: &mut Buffers,
    ) -> Result<usize, Box<dyn StdError + Send + Sync>> {
        match *self {}
    }

    pub(super) fn encrypt_pieces<'a>(
        &mut self,
        _plain: impl Iterator<Item = &'a [u8]>,
        _buffers: &mut Buffers,
    ) -> Result<usize, Box<dyn StdError + Send + Sync>> {
        match *self {}
    }

    pub(super) fn close_notify(
        &mut self,
        _buffers: &mut Buffers,
    ) -> Result<(), Box<dyn StdError + Send + Sync>> {
        match *self {}
    }

    pub(super) fn pending(&self) -> &[u8] {
        match *self {}
    }

    pub(super) fn memory(&self) -> (usize, usize) {
        match *self {}
    }

    pub(super) fn shrink(&mut self, _buffers: &mut Buffers) {
        match *self {}
    }

    #[cfg(feature = "sim")]
    pub(super) fn is_compact(&self) -> bool {
        match *self {}
    }

    pub(super) fn pending_app_bytes(&self) -> usize {
        match *self {}
    }

    pub(super) fn tls_overhead(&self) -> usize {
        match *self {}
    }

    pub(super) fn advance(&mut self, _count: usize) {
        match *self {}
    }

    pub(super) fn buffered(&self) -> usize {
        match *self {}
    }

    pub(super) fn silence(&mut self, _buffers: &mut Buffers) {
        match *self {}
    }

    pub(super) fn clear(&mut self, _buffers: &mut Buffers) {
        match *self {}
    }
}

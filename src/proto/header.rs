//! Before anything else: the PROXY header, if one is to come.

use std::rc::Rc;

use super::proxy::{self, Front, ProxyError, ProxyHeader};
use super::state::{Flags, State};
use super::{Machine, Pool, Time};
use crate::reason::{CloseReason, Closed};

impl Machine {
    /// Waits for a PROXY header before anything else. If it is not `required`, other bytes than those of a header are the
    /// beginning of a connection without one.
    pub(crate) fn await_header(&mut self, required: bool) {
        self.flags.set(Flags::AWAITS_HEADER);
        if required {
            self.flags.set(Flags::HEADER_REQUIRED);
        }
    }

    /// A header is to come, or has come and the service is to be asked.
    #[cfg(feature = "sim")]
    pub(crate) fn awaits_header(&self) -> bool {
        self.flags.has(Flags::AWAITS_HEADER) || self.flags.has(Flags::HEADER_PENDING)
    }

    pub(crate) fn proxy(&self) -> Option<&Rc<ProxyHeader>> {
        self.proxy.as_ref()
    }

    /// The service, or an access rule, does not want the peer: last words in the clear, then an orderly end.
    pub(crate) fn refuse(&mut self, farewell: &[u8], closed: Closed, now: Time, pool: &mut Pool) {
        self.tls = None;
        if !farewell.is_empty() {
            self.send_buf.tail(pool).extend_from_slice(farewell);
        }
        self.close(closed, now, pool);
    }

    pub(super) fn look_for_header(&mut self, now: Time, pool: &mut Pool) {
        match proxy::front(&self.recv_buf) {
            Front::Header(header, taken) => {
                self.recv_buf.drain(..taken);
                self.proxy = Some(Rc::from(header));
                self.header_is_over();
            }
            Front::More => {}
            Front::Other if self.flags.has(Flags::HEADER_REQUIRED) => {
                self.close(
                    Closed::with(CloseReason::BadProxyHeader, ProxyError::MISSING),
                    now,
                    pool,
                );
            }
            Front::Other => self.header_is_over(),
            Front::Bad(error) => self.close(Closed::with(CloseReason::BadProxyHeader, error), now, pool),
        }
    }

    fn header_is_over(&mut self) {
        if self.recv_buf.is_empty() {
            self.recv_buf = Vec::new();
        }
        self.flags.clear(Flags::AWAITS_HEADER);
        self.flags.set(Flags::HEADER_PENDING);
    }

    /// The peer finished before its header was whole.
    pub(super) fn fail_header(&mut self, now: Time, pool: &mut Pool) {
        debug_assert_eq!(self.state, State::Accepting);
        let closed = if self.recv_buf.is_empty() {
            Closed::new(CloseReason::ClosedEarly)
        } else {
            Closed::with(CloseReason::BadProxyHeader, ProxyError::CUT_OFF)
        };
        self.close(closed, now, pool);
    }
}

//! A client that was accepted and has no handler yet.

use std::rc::Rc;

use super::listener::Listener;
use crate::addr::{Addr, Credentials};
use crate::handler::Peer;
use crate::id::ConnId;
use crate::proto::ProxyHeader;

#[derive(Clone, Debug)]
pub(super) struct Incoming {
    pub(super) addr: Addr,
    pub(super) credentials: Option<Credentials>,
    pub(super) proxy: Option<Rc<ProxyHeader>>,
}

impl Incoming {
    /// The client as the listener's service sees it.
    pub(super) fn peer<L>(self, listener: &Listener<L>, id: Option<ConnId>) -> Peer {
        Peer {
            id,
            addr: self.addr,
            credentials: self.credentials,
            listener: listener.id,
            listener_name: Rc::clone(&listener.name),
            proxy: self.proxy,
        }
    }
}

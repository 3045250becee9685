//! The TLS client of a world that is played.

use std::collections::VecDeque;

use kit::sim_tls::Client;
use portcullis::sim::{ClientId, Sim};
use portcullis::Listen;

pub struct Secure {
    client: Client,
    /// Of its first flight: the bytes that it has not sent.
    hello: VecDeque<u8>,
}

impl Secure {
    pub fn new() -> Self {
        let mut client = Client::new();
        let hello = client.encrypt(b"").into();
        Self { client, hello }
    }

    /// A listener for it.
    pub fn listen(listen: Listen) -> Listen {
        listen.tls(kit::sim_tls::server_config())
    }

    /// The next byte of its first flight.
    pub fn part(&mut self) -> Vec<u8> {
        self.hello.pop_front().into_iter().collect()
    }

    /// Completes the handshake.
    pub fn shake<A>(&mut self, sim: &mut Sim<A>, id: ClientId) -> Result<(), String> {
        let mut wire: Vec<u8> = self.hello.drain(..).collect();
        while !wire.is_empty() {
            sim.send(id, &wire);
            sim.settle();
            wire = self.client.decrypt(&sim.received(id), &mut Vec::new())?;
        }
        Ok(())
    }

    pub fn encrypt(&mut self, plain: &[u8]) -> Vec<u8> {
        self.client.encrypt(plain)
    }

    pub fn close_notify(&mut self) -> Vec<u8> {
        self.client.close_notify()
    }
}

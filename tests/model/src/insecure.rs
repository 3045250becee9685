//! In the place of the TLS client, in a build without TLS, which plays no world that needs one.

use portcullis::sim::{ClientId, Sim};
use portcullis::Listen;

pub struct Secure;

impl Secure {
    pub fn new() -> Self {
        Self
    }

    pub fn listen(listen: Listen) -> Listen {
        listen
    }

    pub fn part(&mut self) -> Vec<u8> {
        Vec::new()
    }

    pub fn shake<A>(&mut self, _: &mut Sim<A>, _: ClientId) -> Result<(), String> {
        Err("built without TLS".to_owned())
    }

    pub fn encrypt(&mut self, plain: &[u8]) -> Vec<u8> {
        plain.to_vec()
    }

    pub fn close_notify(&mut self) -> Vec<u8> {
        Vec::new()
    }
}

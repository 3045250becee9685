//! The clients of the campaign: what they say, and what they make of what they hear.

use std::collections::VecDeque;
use std::net::SocketAddr;

use portcullis::sim::{ClientId, Random};

use super::app::Talk;
use super::header::Opening;
#[cfg(feature = "tls")]
use crate::sim_tls;

/// A client.
pub struct SimClient {
    pub id: ClientId,
    pub addr: SocketAddr,
    pub finished: bool,
    /// What it begins with and has not sent yet.
    unsaid: VecDeque<u8>,
    /// It may say a part of that alone.
    hesitates: bool,
    /// It speaks another protocol than its door: nothing of what it says counts.
    pub odd: bool,
    /// What it has heard, TLS taken off.
    pub received: usize,
    /// It has reset the connection.
    pub reset: bool,
    /// Its TLS heard something else than TLS.
    pub deaf: bool,
    #[cfg(feature = "tls")]
    pub tls: Option<sim_tls::Client>,
}

impl SimClient {
    pub fn new(id: ClientId, addr: SocketAddr, tls: bool, odd: bool) -> Self {
        #[cfg(not(feature = "tls"))]
        let _ = tls;
        Self {
            id,
            addr,
            finished: false,
            unsaid: VecDeque::new(),
            hesitates: true,
            odd,
            received: 0,
            reset: false,
            deaf: false,
            #[cfg(feature = "tls")]
            tls: (tls && !odd).then(sim_tls::Client::new),
        }
    }

    /// Shows a chain of certificates to a server that asks for one. Before it says anything.
    #[cfg(feature = "tls")]
    pub fn show(&mut self, random: &mut Random) {
        if let (Some(tls), Some(&chain)) = (&mut self.tls, random.pick(&sim_tls::Chain::ALL)) {
            *tls = sim_tls::Client::showing(chain);
        }
    }

    /// The beginning of a ClientHello, and nothing behind it.
    pub fn hello() -> Vec<u8> {
        vec![0x16, 3, 1, 0x3F, 0xFF, 1, 0, 0x3F, 0xFB, 3, 3]
    }

    /// Will begin with this, now or when it says something.
    pub fn begin(&mut self, talk: &mut Talk, opening: Opening, random: &mut Random) -> Vec<u8> {
        self.unsaid = opening.bytes.iter().copied().collect();
        talk.opening = opening;
        let now = match random.below(10) {
            0..=1 => self.unsaid.len(),
            2..=4 => random.below(self.unsaid.len()),
            _ => 0,
        };
        self.introduce(talk, now)
    }

    /// So much more of what it begins with.
    fn introduce(&mut self, talk: &mut Talk, bytes: usize) -> Vec<u8> {
        let bytes: Vec<u8> = self.unsaid.drain(..bytes.min(self.unsaid.len())).collect();
        talk.opening_sent += bytes.len();
        if !talk.tls {
            talk.said.extend(&bytes);
        }
        // It spoils an upgrade that has begun meanwhile.
        talk.murky |= talk.upgraded_at.is_some() && !bytes.is_empty();
        bytes
    }

    /// What it begins with is still to come.
    pub fn has_to_begin(&self) -> bool {
        !self.unsaid.is_empty() && !self.finished && !self.deaf
    }

    /// What it says next it says after all of its beginning.
    pub fn speak_up(&mut self) {
        self.hesitates = false;
    }

    /// Some frames for the wire; or only a part of what is to come before them.
    pub fn say(&mut self, talk: &mut Talk, random: &mut Random, frames: usize) -> Vec<u8> {
        if self.hesitates && !self.unsaid.is_empty() && random.chance(500) {
            let all = self.unsaid.len();
            let part = [all, random.between(1, all)][random.below(2)];
            return self.introduce(talk, part);
        }
        let mut plain = Vec::new();
        for _ in 0..frames {
            // Up to the maximum: a line counts its delimiter.
            let length = if random.chance(100) {
                0
            } else {
                random.below(talk.max)
            };
            let payload: Vec<u8> = if length > 255 {
                vec![b'a' + random.below(26) as u8; length]
            } else {
                (0..length).map(|_| b'a' + random.below(26) as u8).collect()
            };
            plain.extend(talk.wire.utter(&payload));
        }
        self.utter(talk, &plain)
    }

    /// Something that no protocol has foreseen.
    pub fn rave(&mut self, talk: &mut Talk, random: &mut Random, record: bool) -> Vec<u8> {
        #[cfg(feature = "tls")]
        if record && self.tls.is_some() {
            // A record that decrypts to nothing.
            let mut wire = self.introduce(talk, usize::MAX);
            wire.extend([23, 3, 3, 0, 5, 1, 2, 3, 4, 5]);
            return wire;
        }
        let _ = record;
        let mut rubbish: Vec<u8> = (0..random.between(1, 40))
            .map(|_| random.below(256) as u8)
            .collect();
        if random.chance(100) {
            // What `Wire::Five` refuses.
            rubbish.fill(b'!');
        }
        self.utter(talk, &rubbish)
    }

    /// Plain bytes on their way to the wire.
    pub fn utter(&mut self, talk: &mut Talk, plain: &[u8]) -> Vec<u8> {
        if self.deaf {
            return Vec::new();
        }
        let mut wire = self.introduce(talk, usize::MAX);
        talk.said.extend(plain);
        // It has not heard yet that the server waits for something else.
        talk.murky |= talk.upgraded_at.is_some() && !self.speaks_tls() && !plain.is_empty();
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut self.tls {
            wire.extend(tls.encrypt(plain));
            return wire;
        }
        wire.extend(plain);
        wire
    }

    pub fn goodbye(&mut self) -> Vec<u8> {
        #[cfg(feature = "tls")]
        if let (Some(tls), false, true) = (&mut self.tls, self.deaf, self.unsaid.is_empty()) {
            return tls.close_notify();
        }
        Vec::new()
    }

    /// Takes what came, and compares it with what was promised; returns what must be said to that (TLS handshakes).
    pub fn hear(&mut self, bytes: &[u8], talk: &Talk) -> Result<Vec<u8>, String> {
        if self.deaf || bytes.is_empty() {
            return Ok(Vec::new());
        }
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut self.tls {
            // A farewell comes in the clear.
            let sent_away = talk.failed_accept.is_some() || talk.refused;
            self.deaf = sent_away && talk.promised.starts_with(bytes);
            if self.deaf {
                return Ok(Vec::new());
            }
            let mut plain = Vec::new();
            let reply = tls.decrypt(bytes, &mut plain)?;
            self.compare(&plain, talk)?;
            return Ok(reply);
        }
        // An odd one hears alerts.
        if !self.odd {
            self.compare(bytes, talk)?;
        }
        #[cfg(feature = "tls")]
        if talk.upgraded_at == Some(self.received) && !self.odd && !talk.murky && !self.finished {
            let tls = self.tls.insert(sim_tls::Client::new());
            return Ok(tls.encrypt(b""));
        }
        Ok(Vec::new())
    }

    fn speaks_tls(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.tls.is_some();
        #[cfg(not(feature = "tls"))]
        false
    }

    fn compare(&mut self, plain: &[u8], talk: &Talk) -> Result<(), String> {
        let promised = talk.promised.get(self.received..).unwrap_or_default();
        self.received += plain.len();
        if talk.murky || promised.starts_with(plain) {
            return Ok(());
        }
        Err(format!(
            "client {:?} got what nobody sent: {plain:?} where {promised:?} was to come",
            self.id
        ))
    }
}

//! Ciphers of a provider that fail: their connection ends, and no other.
#![cfg(feature = "tls")]

use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;

use kit::net::{local, ping, spawn, spawn_echo, ReadSome, Running};
use kit::tls::{provider, secure, Site};
use portcullis::tls::rustls::crypto::cipher::{
    AeadKey, Iv, MessageDecrypter, MessageEncrypter, OutboundOpaqueMessage, OutboundPlainMessage,
    Tls13AeadAlgorithm, UnsupportedOperationError,
};
use portcullis::tls::rustls::crypto::{CipherSuiteCommon, CryptoProvider};
use portcullis::tls::rustls::{
    version, ConnectionTrafficSecrets, Error, ServerConfig, SupportedCipherSuite, Tls13CipherSuite,
};
use portcullis::{CloseReason, Config, Context, Handler, Outcome, Server};

/// How encryption ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Error,
    Panic,
}

struct Fails {
    cipher: &'static dyn Tls13AeadAlgorithm,
    fault: Fault,
    /// The number of records that are encrypted.
    records: u64,
}

struct Encrypter {
    encrypter: Box<dyn MessageEncrypter>,
    fault: Fault,
    records: u64,
}

impl MessageEncrypter for Encrypter {
    fn encrypt(
        &mut self,
        message: OutboundPlainMessage<'_>,
        record: u64,
    ) -> Result<OutboundOpaqueMessage, Error> {
        match self.fault {
            _ if record < self.records => self.encrypter.encrypt(message, record),
            Fault::Error => Err(Error::EncryptError),
            Fault::Panic => kit::planned::blow(),
        }
    }

    fn encrypted_payload_len(&self, length: usize) -> usize {
        self.encrypter.encrypted_payload_len(length)
    }
}

impl Tls13AeadAlgorithm for Fails {
    fn encrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageEncrypter> {
        Box::new(Encrypter {
            encrypter: self.cipher.encrypter(key, iv),
            fault: self.fault,
            records: self.records,
        })
    }

    fn decrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageDecrypter> {
        self.cipher.decrypter(key, iv)
    }

    fn key_len(&self) -> usize {
        self.cipher.key_len()
    }

    fn extract_keys(
        &self,
        key: AeadKey,
        iv: Iv,
    ) -> Result<ConnectionTrafficSecrets, UnsupportedOperationError> {
        self.cipher.extract_keys(key, iv)
    }
}

fn failing(fault: Fault, records: u64) -> CryptoProvider {
    let mut provider = CryptoProvider::clone(&provider());
    for suite in &mut provider.cipher_suites {
        let SupportedCipherSuite::Tls13(good) = *suite else {
            continue;
        };
        *suite = SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
            common: CipherSuiteCommon {
                suite: good.common.suite,
                hash_provider: good.common.hash_provider,
                confidentiality_limit: good.common.confidentiality_limit,
            },
            hkdf_provider: good.hkdf_provider,
            aead_alg: Box::leak(Box::new(Fails {
                cipher: good.aead_alg,
                fault,
                records,
            })),
            quic: None,
        })));
    }
    provider
}

fn config(site: &Site, fault: Fault, records: u64) -> ServerConfig {
    ServerConfig::builder_with_provider(Arc::new(failing(fault, records)))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(site.identity.chain.clone(), site.identity.key())
        .expect("an identity")
}

/// The session tickets are one record.
const TICKETS: u64 = 1;

/// And five answers.
const RECORDS: u64 = TICKETS + 5;

#[test]
fn a_cipher_that_fails_ends_its_own_connection() {
    for fault in [Fault::Error, Fault::Panic] {
        let site = Site::new();
        let config = config(&site, fault, RECORDS);
        let server = spawn_echo(Config::new(), local().tls(config));
        let client = site.client(&version::TLS13);
        let mut tls = secure(server.addr(), &client);
        let mut other = secure(server.addr(), &client);
        ping(&mut other, b"before");
        // A record for each answer. What was begun of the last one is not sent: the stream ends.
        let end = (0..RECORDS).find_map(|_| {
            tls.write_all(b"\0\x05hello").expect("sent");
            tls.flush().expect("sent");
            tls.read_exact(&mut [0; 7]).err()
        });
        let end = end.map(|error| error.kind());
        assert_eq!(end, Some(ErrorKind::UnexpectedEof), "{fault:?}");
        let stats = server.until("it ends", |stats| stats.closed_total() == 1);
        assert_eq!(stats.closed(CloseReason::Panicked), 1, "{fault:?}");
        assert_eq!(stats.panics, 1, "{fault:?}");
        ping(&mut other, b"unharmed");
    }
}

/// The last record is close_notify.
#[test]
fn a_cipher_that_fails_at_the_end_is_counted() {
    /// Closes, or only sends no more.
    struct Leaves {
        finishes: bool,
    }
    impl Handler for Leaves {
        fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
            match self.finishes {
                true => cx.conn.finish(),
                false => cx.conn.close(),
            }
            Ok(())
        }
        fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
            Ok(())
        }
    }

    let faults = [Fault::Error, Fault::Panic];
    for (fault, finishes) in faults
        .into_iter()
        .flat_map(|fault| [(fault, false), (fault, true)])
    {
        let site = Site::new();
        let listen = local().tls(config(&site, fault, TICKETS));
        let server: Running = spawn(move || {
            let mut server = Server::new(Config::new()).expect("server");
            server
                .listen(listen, move |_: &mut (), _| Leaves { finishes })
                .expect("listen");
            (server, ())
        });
        let mut tls = secure(server.addr(), &site.client(&version::TLS13));
        let end = tls.read_some(&mut [0; 1]).map_err(|error| error.kind());
        assert_eq!(end, Err(ErrorKind::UnexpectedEof), "{fault:?} {finishes}");
        drop(tls);
        let stats = server.until("it ends", |stats| stats.closed_total() == 1);
        assert_eq!(
            stats.closed(CloseReason::Panicked),
            1,
            "{fault:?} {finishes}"
        );
        assert_eq!(stats.panics, 1, "{fault:?} {finishes}");
    }
}

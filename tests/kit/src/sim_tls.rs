//! A TLS client for the simulator, and the server's configuration. Ed25519 and X25519, so that lengths do not vary from
//! run to run; the bytes do.

use std::sync::{Arc, OnceLock};

use portcullis::sim::{ClientId, Sim};
use portcullis::tls::rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use portcullis::tls::rustls::{self, ClientConfig, ClientConnection, RootCertStore, ServerConfig};
use portcullis::tls::BoundedVerifier;

use crate::tls::provider;

mod chains;

pub use chains::{take_most_steps, Chain};
use chains::{CountingVerifier, Shown};

struct Configs {
    server: Arc<ServerConfig>,
    /// It asks its clients for certificates.
    asking: Arc<ServerConfig>,
    /// Clients that show something, by the number of [`Chain`].
    showing: Vec<Arc<ClientConfig>>,
    client: Arc<ClientConfig>,
    client12: Arc<ClientConfig>,
}

fn configs() -> &'static Configs {
    static CONFIGS: OnceLock<Configs> = OnceLock::new();
    CONFIGS.get_or_init(|| make().expect("a certificate for the simulator"))
}

fn make() -> Result<Configs, Box<dyn std::error::Error>> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
    let mut parameters = rcgen::CertificateParams::new(["localhost".to_owned()])?;
    // One drawn from the key may be a byte shorter, and a seed's replay another world.
    parameters.serial_number = Some(rcgen::SerialNumber::from(1));
    let certificate: CertificateDer<'static> = parameters.self_signed(&key)?.der().clone();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone())?;
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    let server =
        || ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let shown = Chain::ALL.map(Shown::new).into_iter();
    let shown: Vec<Arc<Shown>> = shown
        .map(|shown| shown.map(Arc::new))
        .collect::<Result<_, _>>()?;
    let verifier = BoundedVerifier::new(Arc::new(CountingVerifier(shown.clone())));
    let asking = server()?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(vec![certificate.clone()], key.clone_key().into())?;
    let server = server()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key.into())?;
    let showing = shown.iter().map(|shown| {
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(shown.certificates(), shown.key().into())?;
        client.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(client))
    });
    let showing = showing.collect::<Result<_, rustls::Error>>()?;
    let client = |versions| -> Result<Arc<ClientConfig>, rustls::Error> {
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)?
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        // A resumed handshake has other lengths than a full one, and earlier tests decide which
        // clients resume.
        client.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(client))
    };
    Ok(Configs {
        server: Arc::new(server),
        asking: Arc::new(asking),
        showing,
        client: client(&[&rustls::version::TLS13])?,
        client12: client(&[&rustls::version::TLS12])?,
    })
}

pub fn server_config() -> Arc<ServerConfig> {
    Arc::clone(&configs().server)
}

/// Of a server that asks for certificates, and bounds what verifying them costs.
pub fn asking_server_config() -> Arc<ServerConfig> {
    Arc::clone(&configs().asking)
}

pub fn client_config() -> Arc<ClientConfig> {
    Arc::clone(&configs().client)
}

/// A client's half of a TLS connection.
pub struct Client {
    connection: ClientConnection,
    /// It has said close_notify.
    goodbye: bool,
}

impl Client {
    /// TLS 1.3.
    pub fn new() -> Self {
        Self::with(&configs().client)
    }

    /// TLS 1.3, with a chain of certificates if it is asked for one.
    pub fn showing(chain: Chain) -> Self {
        match chain {
            Chain::Nothing => Self::new(),
            chain => Self::with(&configs().showing[chain as usize]),
        }
    }

    pub fn tls12() -> Self {
        Self::with(&configs().client12)
    }

    fn with(config: &Arc<ClientConfig>) -> Self {
        let name = ServerName::try_from("localhost").expect("a name");
        let mut connection = ClientConnection::new(Arc::clone(config), name).expect("a client");
        connection.set_buffer_limit(None);
        Self {
            connection,
            goodbye: false,
        }
    }

    /// Shakes hands with a server of the simulator, as this client of it.
    pub fn shake<A>(&mut self, sim: &mut Sim<A>, client: ClientId) {
        let mut wire = self.encrypt(b"");
        for _ in 0..5 {
            sim.send(client, &wire);
            sim.settle();
            let answer = sim.received(client);
            wire = self.decrypt(&answer, &mut Vec::new()).expect("TLS");
        }
    }

    /// What goes out for this plaintext; before the handshake is done, the ClientHello and nothing else. After a failure
    /// nothing does.
    pub fn encrypt(&mut self, plain: &[u8]) -> Vec<u8> {
        use std::io::Write;
        let _ = self.connection.writer().write_all(plain);
        self.flush()
    }

    pub fn close_notify(&mut self) -> Vec<u8> {
        self.goodbye = true;
        self.connection.send_close_notify();
        self.flush()
    }

    /// Takes ciphertext, appends plaintext, returns what must be said in turn.
    pub fn decrypt(&mut self, mut wire: &[u8], plain: &mut Vec<u8>) -> Result<Vec<u8>, String> {
        use std::io::Read;
        while !wire.is_empty() {
            let taken = self
                .connection
                .read_tls(&mut wire)
                .map_err(|error| error.to_string())?;
            let outcome = self.connection.process_new_packets();
            if let Err(error) = outcome {
                // An alert from the server is an end like others; anything else is a broken stream.
                return match error {
                    rustls::Error::AlertReceived(_) => Ok(Vec::new()),
                    error => Err(format!("the client's TLS fails: {error}")),
                };
            }
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = self.connection.reader().read(&mut buffer) {
                plain.extend_from_slice(&buffer[..count]);
            }
            if taken == 0 {
                break;
            }
        }
        Ok(self.flush())
    }

    /// As [`Client::decrypt`], of a stream that may be damaged: `None` once the client gives up.
    pub fn hear(
        &mut self,
        wire: &[u8],
        plain: &mut Vec<u8>,
        meddled: bool,
    ) -> Result<Option<Vec<u8>>, String> {
        // A rustls client that has said goodbye asserts, in debug builds, that it finds no fault afterwards.
        if meddled && self.goodbye {
            return Ok(None);
        }
        match self.decrypt(wire, plain) {
            Err(_) if meddled => Ok(None),
            outcome => outcome.map(Some),
        }
    }

    fn flush(&mut self) -> Vec<u8> {
        let mut wire = Vec::new();
        while self.connection.wants_write() {
            self.connection
                .write_tls(&mut wire)
                .expect("a Vec takes all");
        }
        wire
    }
}

//! A client for the echo server: sends words, prints what comes back. Blocking, nothing but std (and rustls for --tls).
//!
//!     cargo run --release --example echo_client -- hello world

use std::error::Error;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

#[path = "support/framing.rs"]
mod framing;
#[path = "support/terminal.rs"]
mod terminal;
use framing::FramingName;

/// Sends each word as one message and prints each answer on a line.
#[derive(Debug, Parser)]
#[command(version, name = "echo_client")]
struct Options {
    /// The server
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:2222")]
    connect: String,

    /// How the stream is cut into messages
    #[arg(long, value_enum, default_value_t = FramingName::Packet2)]
    framing: FramingName,

    /// Speak TLS
    #[arg(long)]
    tls: bool,

    /// With --tls: trust this certificate authority, or self-signed certificate
    #[arg(long, value_name = "PEM", requires = "tls")]
    ca: Option<std::path::PathBuf>,

    /// With --tls: trust any certificate
    #[arg(long, requires = "tls", conflicts_with = "ca")]
    insecure: bool,

    /// What to send
    #[arg(required = true)]
    words: Vec<String>,
}

fn main() -> ExitCode {
    terminal::exit_code("echo_client", talk(&Options::parse()))
}

fn talk(options: &Options) -> Result<(), Box<dyn Error>> {
    let server = &options.connect;
    let socket = TcpStream::connect(server)
        .map_err(|error| format!("cannot connect to {server}: {error}"))?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    if options.tls {
        let mut stream = tls::connect(options, socket)?;
        exchange(options, &mut stream)?;
        tls::say_goodbye(&mut stream)?;
    } else {
        exchange(options, &socket)?;
    }
    Ok(())
}

/// Sends a word, waits for its answer, sends the next.
fn exchange(options: &Options, stream: impl Read + Write) -> Result<(), Box<dyn Error>> {
    let mut stream = BufReader::new(stream);
    for word in &options.words {
        let message = encode(options.framing, word)?;
        stream.get_mut().write_all(&message)?;
        stream.get_mut().flush()?;
        let answer = receive(options.framing, &mut stream, message.len()).map_err(explain)?;
        terminal::say(&String::from_utf8_lossy(&answer));
    }
    Ok(())
}

fn encode(framing: FramingName, word: &str) -> Result<Vec<u8>, String> {
    let mut message = word.as_bytes().to_vec();
    if framing == FramingName::Line {
        message.push(b'\n');
    }
    let header = framing.header();
    let length = (message.len() as u64).to_be_bytes();
    let (unused, length) = length.split_at(length.len() - header);
    if header > 0 && unused.iter().any(|&byte| byte != 0) {
        return Err(format!(
            "{} bytes are too many for one {} message",
            message.len(),
            framing.name()
        ));
    }
    message.splice(0..0, length.iter().copied());
    Ok(message)
}

fn receive(framing: FramingName, stream: &mut impl BufRead, sent: usize) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    match framing {
        FramingName::Line => {
            stream.read_until(b'\n', &mut answer)?;
            if answer.pop() != Some(b'\n') {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        FramingName::Raw => {
            answer.resize(sent, 0);
            stream.read_exact(&mut answer)?;
        }
        FramingName::Packet1 | FramingName::Packet2 | FramingName::Packet4 => {
            let mut length = [0; 8];
            stream.read_exact(&mut length[8 - framing.header()..])?;
            stream
                .take(u64::from_be_bytes(length))
                .read_to_end(&mut answer)?;
            if answer.len() as u64 != u64::from_be_bytes(length) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
    Ok(answer)
}

fn explain(error: io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            "the server closed the connection before it answered".to_owned()
        }
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "no answer within 10 s".to_owned(),
        _ => format!("no answer: {error}"),
    }
}

#[cfg(not(feature = "tls"))]
mod tls {
    pub fn connect(
        _: &super::Options,
        _: std::net::TcpStream,
    ) -> Result<std::net::TcpStream, String> {
        Err("built without the feature `tls`".into())
    }

    pub fn say_goodbye(_: &mut std::net::TcpStream) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(feature = "tls")]
mod tls {
    use std::net::TcpStream;
    use std::sync::Arc;

    use portcullis::tls::rustls::client::danger::{
        HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
    };
    use portcullis::tls::rustls::crypto::CryptoProvider;
    use portcullis::tls::rustls::pki_types::pem::PemObject;
    use portcullis::tls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use portcullis::tls::rustls::{
        ClientConfig, ClientConnection, DigitallySignedStruct, Error, RootCertStore,
        SignatureScheme, StreamOwned,
    };

    use super::{framing, Options};

    pub fn connect(
        options: &Options,
        socket: TcpStream,
    ) -> Result<StreamOwned<ClientConnection, TcpStream>, Box<dyn std::error::Error>> {
        let provider = framing::provider();
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?;
        let config = if options.insecure {
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(TrustAnybody(provider)))
                .with_no_client_auth()
        } else {
            let ca = options
                .ca
                .as_deref()
                .ok_or("--tls needs --ca PEM, or --insecure")?;
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_file_iter(ca)? {
                roots.add(certificate?)?;
            }
            builder.with_root_certificates(roots).with_no_client_auth()
        };
        let host = options
            .connect
            .rsplit_once(':')
            .map_or(options.connect.as_str(), |(host, _)| host);
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
        Ok(StreamOwned::new(
            ClientConnection::new(Arc::new(config), name)?,
            socket,
        ))
    }

    /// close_notify, so that the server knows that nothing was cut off.
    pub fn say_goodbye(
        stream: &mut StreamOwned<ClientConnection, TcpStream>,
    ) -> std::io::Result<()> {
        use std::io::Write;
        stream.conn.send_close_notify();
        stream.flush()
    }

    /// For trying things out on one's own machine.
    #[derive(Debug)]
    struct TrustAnybody(Arc<CryptoProvider>);

    impl ServerCertVerifier for TrustAnybody {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
}

//! A TLS client that is driven in lock-step.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use portcullis::tls::rustls::{ClientConfig, ClientConnection};

/// A client; it blocks once it is open.
pub struct Client {
    tls: ClientConnection,
    stream: TcpStream,
}

impl Client {
    pub fn new(config: Arc<ClientConfig>, stream: TcpStream) -> Self {
        let tls = ClientConnection::new(config, "localhost".try_into().expect("a name"))
            .expect("a client");
        Self { tls, stream }
    }

    /// Says what it has to say for its handshake, after it has read what has come. True once that is over.
    pub fn shake_hands(&mut self) -> bool {
        self.stream.set_nonblocking(true).expect("nonblocking");
        match self.tls.complete_io(&mut self.stream) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("the handshake failed: {error}"),
        }
        self.stream.set_nonblocking(false).expect("blocking");
        !self.tls.is_handshaking() && !self.tls.wants_write()
    }
}

impl Read for Client {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.tls.wants_read() {
            self.tls.read_tls(&mut self.stream)?;
            self.tls.process_new_packets().map_err(io::Error::other)?;
        }
        self.tls.reader().read(buffer)
    }
}

impl Write for Client {
    /// In one record.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.tls.writer().write(bytes)?;
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.stream)?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

//! The load's TLS connections.

use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use mio::net::TcpStream;
use portcullis::tls::rustls::{ClientConfig, ClientConnection};

use super::load::Stream;

/// A client's end, open and then nonblocking.
pub struct TlsStream {
    tls: ClientConnection,
    socket: TcpStream,
}

impl TlsStream {
    /// Connects, and shakes hands.
    pub fn connect(addr: SocketAddr, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let name = "localhost".try_into().expect("a name");
        let mut tls = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
        let mut socket = std::net::TcpStream::connect(addr)?;
        socket.set_nodelay(true)?;
        tls.complete_io(&mut socket)?;
        socket.set_nonblocking(true)?;
        let socket = TcpStream::from_std(socket);
        Ok(Self { tls, socket })
    }
}

impl Read for TlsStream {
    /// Fills the buffer, or empties the socket.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        loop {
            match self.tls.reader().read(&mut buffer[filled..]) {
                Ok(0) => return Ok(filled),
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    match self.tls.read_tls(&mut self.socket) {
                        Ok(0) => return Ok(filled),
                        Ok(_) => {}
                        Err(_) if filled > 0 => return Ok(filled),
                        Err(error) => return Err(error),
                    }
                    self.tls.process_new_packets().map_err(io::Error::other)?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Write for TlsStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.tls.writer().write(bytes) {
            Ok(0) if !bytes.is_empty() => {
                self.flush()?;
                self.tls.writer().write(bytes)
            }
            written => written,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.socket)?;
        }
        Ok(())
    }
}

impl Stream for TlsStream {
    fn socket(&mut self) -> &mut TcpStream {
        &mut self.socket
    }
}

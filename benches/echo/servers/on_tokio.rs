//! Servers on tokio, in one thread.

use std::future::Future;
use std::io;

use bytes::Bytes;
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::{print_addr, whole};
use crate::common::site::Site;

/// TCP, or TLS over it.
pub trait Io: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Io for S {}

pub fn by_hand() {
    run(None, echo);
}

pub fn codec_send() {
    run(None, send_each);
}

pub fn tls_by_hand(site: Site) {
    let acceptor = TlsAcceptor::from(site.server.clone());
    run(Some(&site), move |stream| {
        let accept = acceptor.accept(stream);
        async move { echo(accept.await?).await }
    });
}

pub fn tls_codec_send(site: Site) {
    let acceptor = TlsAcceptor::from(site.server.clone());
    run(Some(&site), move |stream| {
        let accept = acceptor.accept(stream);
        async move { send_each(accept.await?).await }
    });
}

pub fn codec_feed() {
    run(None, |stream| async move {
        let mut framed = packet_2(stream);
        while let Some(frame) = framed.next().await {
            framed.feed(frame?.freeze()).await?;
            while let Some(Some(frame)) = framed.next().now_or_never() {
                framed.feed(frame?.freeze()).await?;
            }
            SinkExt::<Bytes>::flush(&mut framed).await?;
        }
        Ok(())
    });
}

/// A task for each connection.
fn run<F>(site: Option<&Site>, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .expect("a runtime");
    runtime.block_on(async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        print_addr(listener.local_addr().expect("bound"), site);
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                continue;
            };
            let _ = stream.set_nodelay(true);
            tokio::spawn(serve(stream));
        }
    });
}

fn packet_2<S: Io>(stream: S) -> Framed<S, LengthDelimitedCodec> {
    LengthDelimitedCodec::builder()
        .length_field_length(2)
        .max_frame_length(65_535)
        .new_framed(stream)
}

async fn send_each(stream: impl Io) -> io::Result<()> {
    let mut framed = packet_2(stream);
    while let Some(frame) = framed.next().await {
        framed.send(frame?.freeze()).await?;
    }
    Ok(())
}

/// Echoes packet-2.
pub async fn echo(mut stream: impl Io) -> io::Result<()> {
    let mut input = Vec::with_capacity(super::TASK_BUFFER);
    loop {
        input.reserve(super::TASK_BUFFER);
        if stream.read_buf(&mut input).await? == 0 {
            return Ok(());
        }
        let frames = whole(&input);
        if frames > 0 {
            stream.write_all(&input[..frames]).await?;
            stream.flush().await?;
            input.drain(..frames);
        }
    }
}

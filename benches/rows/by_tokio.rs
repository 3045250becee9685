//! Servers on tokio.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;
use tokio_util::codec::{Decoder, Encoder};

use crate::common::fan_out::SUBSCRIBE;
use crate::common::process::commands;
use crate::servers::on_tokio::echo;
use crate::servers::{print_addr, whole, TASK_BUFFER};
use crate::turns::{processor_time, Turns};

/// That of the other servers.
const BACKLOG: u32 = 1024;
const READ: usize = 64 * 1024;
/// Messages that a subscriber may be behind: more than the load has on their way.
const BEHIND: usize = 64;
/// Time without accepting after an error of the system, as hyper and axum have it.
const PAUSE: Duration = Duration::from_secs(1);
/// The time that a drain may take.
const GRACE: Duration = Duration::from_secs(10);

fn one_thread() -> Runtime {
    let mut builder = Builder::new_current_thread();
    builder.enable_all().build().expect("a runtime")
}

/// As `TcpListener::bind`, which has a backlog of 128, and prints the address.
fn listen() -> TcpListener {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let listener = socket.listen(BACKLOG).expect("a port");
    print_addr(listener.local_addr().expect("bound"), None);
    listener
}

/// A task for each connection.
async fn serve<F>(accepted: impl Fn(TcpStream) -> F)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let listener = listen();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let _ = stream.set_nodelay(true);
                tokio::spawn(accepted(stream));
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Echoes packet-2. After an error of the system it accepts nothing for a second.
pub fn by_hand() {
    one_thread().block_on(serve(echo));
}

/// Echoes packet-2 on two threads.
pub fn threads() {
    let mut builder = Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    // In a worker, where accepting is as cheap as in any task.
    let serving = runtime.spawn(serve(echo));
    runtime.block_on(serving).expect("it runs");
}

pub fn raw() {
    one_thread().block_on(serve(|mut stream| async move {
        let mut input = vec![0; READ];
        loop {
            match stream.read(&mut input).await? {
                0 => return Ok(()),
                count => stream.write_all(&input[..count]).await?,
            }
        }
    }));
}

/// Packet-4, as a codec of the user's.
struct Packet4;

impl Decoder for Packet4 {
    type Item = Bytes;
    type Error = io::Error;

    fn decode(&mut self, input: &mut BytesMut) -> io::Result<Option<Bytes>> {
        let Some(header) = input.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*header) as usize;
        if input.len() < 4 + length {
            input.reserve(4 + length - input.len());
            return Ok(None);
        }
        input.advance(4);
        Ok(Some(input.split_to(length).freeze()))
    }
}

impl Encoder<Bytes> for Packet4 {
    type Error = io::Error;

    fn encode(&mut self, payload: Bytes, out: &mut BytesMut) -> io::Result<()> {
        out.reserve(4 + payload.len());
        out.put_u32(payload.len() as u32);
        out.extend_from_slice(&payload);
        Ok(())
    }
}

/// All answers to a read in one flush.
pub fn codec() {
    one_thread().block_on(serve(|stream| async move {
        let mut framed = Packet4.framed(stream);
        while let Some(frame) = framed.next().await {
            framed.feed(frame?).await?;
            while let Some(Some(frame)) = framed.next().now_or_never() {
                framed.feed(frame?).await?;
            }
            framed.flush().await?;
        }
        Ok(())
    }));
}

/// A task for each subscriber, which receives from a channel and writes.
pub fn fan_out() {
    let (sender, _) = broadcast::channel::<Arc<[u8]>>(BEHIND);
    one_thread().block_on(serve(move |stream| {
        subscribe_or_publish(stream, sender.clone())
    }));
}

async fn subscribe_or_publish(
    mut stream: TcpStream,
    sender: broadcast::Sender<Arc<[u8]>>,
) -> io::Result<()> {
    loop {
        let length = stream.read_u32().await?;
        let mut packet = length.to_be_bytes().to_vec();
        packet.resize(4 + length as usize, 0);
        stream.read_exact(&mut packet[4..]).await?;
        if packet[4..] == *SUBSCRIBE {
            let mut receiver = sender.subscribe();
            stream.write_all(&packet).await?;
            while let Ok(packet) = receiver.recv().await {
                stream.write_all(&packet).await?;
            }
            return Ok(());
        }
        let _ = sender.send(packet.into());
    }
}

/// Echoes packet-2. A task that yields all the time notes how long the others take until it is
/// called again.
pub fn iteration(turns: &Turns) {
    let runtime = one_thread();
    let tasks = tokio::task::LocalSet::new();
    let turns = turns.clone();
    tasks.block_on(&runtime, async move {
        let listener = listen();
        let reads = Rc::new(Cell::new(0_u64));
        let read = Rc::clone(&reads);
        tokio::task::spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                tokio::task::spawn_local(counted_echo(stream, Rc::clone(&read)));
            }
        });
        loop {
            let (begun, before) = (processor_time(), reads.get());
            tokio::task::yield_now().await;
            // Without a read there was nothing to do.
            if reads.get() > before {
                turns.note(processor_time() - begun);
            }
        }
    });
}

async fn counted_echo(mut stream: TcpStream, reads: Rc<Cell<u64>>) -> io::Result<()> {
    let mut input = Vec::with_capacity(TASK_BUFFER);
    loop {
        input.reserve(TASK_BUFFER);
        if stream.read_buf(&mut input).await? == 0 {
            return Ok(());
        }
        reads.set(reads.get() + 1);
        let frames = whole(&input);
        stream.write_all(&input[..frames]).await?;
        input.drain(..frames);
    }
}

/// Echoes packet-2. At the command every task finishes its answer and the stream, reads until the
/// client does the same, and is joined. Then a line is printed.
pub fn drain() {
    let (sender, receiver) = watch::channel(false);
    commands(move |_| {
        let _ = sender.send(true);
    });
    one_thread().block_on(async move {
        let listener = listen();
        let mut tasks = JoinSet::new();
        let mut drained = receiver.clone();
        loop {
            tokio::select! {
                _ = drained.changed() => break,
                accepted = listener.accept() => if let Ok((stream, _)) = accepted {
                    let _ = stream.set_nodelay(true);
                    tasks.spawn(echo_until(stream, receiver.clone()));
                }
            }
        }
        drop(listener);
        let all = async { while tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(GRACE, all).await;
        println!("ended");
    });
}

async fn echo_until(mut stream: TcpStream, mut drained: watch::Receiver<bool>) -> io::Result<()> {
    let mut input = Vec::with_capacity(TASK_BUFFER);
    loop {
        input.reserve(TASK_BUFFER);
        let count = tokio::select! {
            biased;
            _ = drained.changed() => break,
            count = stream.read_buf(&mut input) => count?,
        };
        if count == 0 {
            return Ok(());
        }
        let frames = whole(&input);
        stream.write_all(&input[..frames]).await?;
        input.drain(..frames);
    }
    stream.shutdown().await?;
    let mut rest = [0; 1024];
    while stream.read(&mut rest).await.is_ok_and(|count| count > 0) {}
    Ok(())
}

//! The other side of the figures for Redis: GET and SET from memory, by hand on tokio's
//! single-threaded runtime.
//!
//! The server is written for speed: it parses commands where they were read, answers one read with
//! one write, and copies the value of a GET once. It has no limits, timeouts or counters.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::rc::Rc;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

type Db = Rc<RefCell<HashMap<Vec<u8>, Vec<u8>>>>;

/// Free space for each read, at least.
const READ: usize = 16 * 1024;
/// Words of a command; more are an error.
const MAX_WORDS: usize = 8;

fn main() -> io::Result<()> {
    let addr = std::env::args().nth(1);
    let addr = addr.unwrap_or_else(|| "127.0.0.1:0".to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let listener = TcpListener::bind(addr).await?;
        println!("listening on {}", listener.local_addr()?);
        let db = Db::default();
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::task::spawn_local(serve(stream, Rc::clone(&db)));
        }
    })
}

async fn serve(mut stream: TcpStream, db: Db) -> io::Result<()> {
    let mut input = BytesMut::with_capacity(READ);
    let mut output = Vec::with_capacity(READ);
    loop {
        input.reserve(READ);
        if stream.read_buf(&mut input).await? == 0 {
            return Ok(());
        }
        let mut at = 0;
        while let Some((words, count, end)) = parse(&input[at..])? {
            let command = &input[at..at + end];
            let word = |number: usize| command.get(words[number].clone()).unwrap_or_default();
            run(&db, word, count, &mut output);
            at += end;
        }
        input.advance(at);
        if !output.is_empty() {
            stream.write_all(&output).await?;
            output.clear();
            output.shrink_to(READ);
        }
    }
}

/// The words of a command, their number, and the end of the command.
type Words = ([Range<usize>; MAX_WORDS], usize, usize);

/// Parses the command at the front of `input`.
fn parse(input: &[u8]) -> io::Result<Option<Words>> {
    let Some((count, mut at)) = header(input, 0, b'*')? else {
        return Ok(None);
    };
    let mut words = [const { 0..0 }; MAX_WORDS];
    for word in words.get_mut(..count).ok_or(io::ErrorKind::InvalidData)? {
        let Some((length, begin)) = header(input, at, b'$')? else {
            return Ok(None);
        };
        *word = begin..begin + length;
        at = word.end + 2;
        if input.len() < at {
            return Ok(None);
        }
    }
    Ok(Some((words, count, at)))
}

/// Reads `*3` or `$5` at `at`: the number, and where the line ends.
fn header(input: &[u8], at: usize, mark: u8) -> io::Result<Option<(usize, usize)>> {
    let Some((&first, rest)) = input.get(at..).and_then(<[u8]>::split_first) else {
        return Ok(None);
    };
    if first != mark {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut number = 0;
    for (length, &byte) in rest.iter().enumerate().take(10) {
        match byte {
            b'0'..=b'9' => number = number * 10 + usize::from(byte - b'0'),
            b'\r' if rest.len() >= length + 2 => return Ok(Some((number, at + length + 3))),
            b'\r' => return Ok(None),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
    if rest.len() < 10 {
        return Ok(None);
    }
    Err(io::ErrorKind::InvalidData.into())
}

fn run<'a>(db: &Db, word: impl Fn(usize) -> &'a [u8], count: usize, output: &mut Vec<u8>) {
    let is = |name: &str| word(0).eq_ignore_ascii_case(name.as_bytes());
    match count {
        2 if is("get") => match db.borrow().get(word(1)) {
            Some(value) => bulk(value, output),
            None => output.extend_from_slice(b"$-1\r\n"),
        },
        3 if is("set") => {
            let (mut db, value) = (db.borrow_mut(), word(2));
            if let Some(old) = db.get_mut(word(1)) {
                old.clear();
                old.extend_from_slice(value);
            } else {
                db.insert(word(1).to_vec(), value.to_vec());
            }
            output.extend_from_slice(b"+OK\r\n");
        }
        1 if is("ping") => output.extend_from_slice(b"+PONG\r\n"),
        // redis-benchmark asks how the server is configured.
        3 if is("config") => {
            output.extend_from_slice(b"*2\r\n");
            bulk(word(2), output);
            bulk(b"", output);
        }
        _ => output.extend_from_slice(b"-ERR unknown command\r\n"),
    }
}

fn bulk(bytes: &[u8], output: &mut Vec<u8>) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut length = bytes.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (length % 10) as u8;
        length /= 10;
        if length == 0 {
            break;
        }
    }
    output.reserve(bytes.len() + 24);
    output.push(b'$');
    output.extend_from_slice(&digits[at..]);
    output.extend_from_slice(b"\r\n");
    output.extend_from_slice(bytes);
    output.extend_from_slice(b"\r\n");
}

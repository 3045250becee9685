//! HTTP/1.0 and 1.1, as far as the observer needs it: whole requests out of a byte stream, strictly
//! (RFC 9112). What two parsers could understand differently is refused.

use std::fmt;

use httparse::{Error as ParseError, Status as ParseStatus, EMPTY_HEADER};

use crate::proto::{Decoded, FrameError, Framer};

/// Maximum length of a request line with its headers.
pub(super) const MAX_HEAD: usize = 8 * 1024;
/// Maximum length of a request's content.
pub(super) const MAX_BODY: usize = 1024;
const MAX_HEADERS: usize = 64;

/// A request that is answered with an error, and the end of the connection: what follows may not be
/// a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: &'static str,
    pub(super) cause: &'static str,
}

pub(super) const BAD_REQUEST: &str = "400 Bad Request";
pub(super) const NOT_ALLOWED: &str = "405 Method Not Allowed";
pub(super) const HEAD_TOO_LARGE: &str = "431 Request Header Fields Too Large";

const fn refuse(status: &'static str, cause: &'static str) -> Refusal {
    Refusal { status, cause }
}

const fn bad(cause: &'static str) -> Refusal {
    refuse(BAD_REQUEST, cause)
}

pub(super) const HEAD_LIMIT: Refusal = refuse(HEAD_TOO_LARGE, "the headers are too long");

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status, self.cause)
    }
}

impl std::error::Error for Refusal {}

/// Cuts whole requests off the stream, each with its content.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// Number of bytes in which no end of the head was found.
    searched: usize,
}

impl Framer for Requests {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        // One empty line in front of a request is ignored (RFC 9112 section 2.2).
        let start = match input {
            b"\r" => return Ok(Decoded::More),
            [b'\r', b'\n', ..] => 2,
            _ => 0,
        };
        if input.get(start) == Some(&b'\n') {
            return Err(FrameError::new(bad("a line that does not end in CRLF")));
        }
        let Some(head) = self.head_end(input, start).map_err(FrameError::new)? else {
            return Ok(Decoded::More);
        };
        let request = input.get(start..head).unwrap_or_default();
        let body = Request::parse(request).map_err(FrameError::new)?.length;
        let end = head.saturating_add(body);
        if input.len() < end {
            return Ok(Decoded::Need(end));
        }
        self.searched = 0;
        Ok(Decoded::Frame {
            payload: start..end,
            consumed: end,
        })
    }
}

impl Requests {
    /// Returns the end of the head that begins at `start`, behind its empty line.
    fn head_end(&mut self, input: &[u8], start: usize) -> Result<Option<usize>, Refusal> {
        const END: &[u8] = b"\r\n\r\n";
        let from = self.searched.max(start);
        let new = input.get(from..).unwrap_or_default();
        let found = new.windows(END.len()).position(|bytes| bytes == END);
        let end = found.map(|at| from + at + END.len());
        if end.unwrap_or(input.len()).saturating_sub(start) > MAX_HEAD {
            return Err(HEAD_LIMIT);
        }
        if end.is_none() {
            // The end may begin in the last three bytes.
            self.searched = input.len().saturating_sub(END.len() - 1);
        }
        // The byte before was the last that was seen: half of a line's end.
        let from = from.saturating_sub(1).max(start);
        check_line_ends(
            input
                .get(from..end.unwrap_or(input.len()))
                .unwrap_or_default(),
        )?;
        Ok(end)
    }
}

/// Refuses a line feed or a carriage return alone: parsers disagree about them. The last byte may
/// be half of a line's end.
fn check_line_ends(head: &[u8]) -> Result<(), Refusal> {
    let is_alone = |pair: &[u8]| match pair {
        [b'\r', second] => *second != b'\n',
        [first, b'\n'] => *first != b'\r',
        _ => false,
    };
    if head.windows(2).any(is_alone) {
        return Err(bad("a line that does not end in CRLF"));
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Head,
    Post,
    Other,
}

/// One request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request<'a> {
    pub(super) method: Method,
    pub(super) path: &'a str,
    pub(super) query: &'a str,
    /// The host that the client asked: the target's if that is a whole URL, else the header's.
    pub(super) host: Option<&'a str>,
    pub(super) origin: Option<&'a str>,
    pub(super) authorization: Option<&'a str>,
    /// Whether another request may follow.
    pub(super) keeps_alive: bool,
    pub(super) body: &'a [u8],
    /// The length of the content, as announced.
    length: usize,
}

impl<'a> Request<'a> {
    /// Reads a request; its content may be missing.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, Refusal> {
        let mut headers = [EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        let head = match parsed.parse(bytes) {
            Ok(ParseStatus::Complete(head)) => head,
            Ok(ParseStatus::Partial) => return Err(bad("no whole request")),
            Err(ParseError::TooManyHeaders) => {
                return Err(refuse(HEAD_TOO_LARGE, "too many headers"));
            }
            Err(ParseError::Version) => {
                let status = "505 HTTP Version Not Supported";
                return Err(refuse(status, "neither HTTP/1.0 nor HTTP/1.1"));
            }
            Err(_) => return Err(bad("no HTTP request")),
        };
        let fields = Fields::read(parsed.headers)?;
        let is_new = parsed.version == Some(1);
        let method = match parsed.method {
            Some("GET") => Method::Get,
            Some("HEAD") => Method::Head,
            Some("POST") => Method::Post,
            _ => Method::Other,
        };
        let length = fields.content_length()?;
        match method {
            _ if length == 0 => {}
            Method::Post if length > MAX_BODY => {
                return Err(refuse("413 Content Too Large", "more than 1 KiB"));
            }
            Method::Post => {}
            Method::Get | Method::Head => return Err(bad("content of a GET or HEAD")),
            Method::Other => return Err(refuse(NOT_ALLOWED, "a method that is not served")),
        }
        if is_new && fields.host.is_none() {
            return Err(bad("no Host header"));
        }
        let (authority, target) = split_target(parsed.path.unwrap_or_default())?;
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        Ok(Self {
            method,
            path,
            query,
            host: authority.or(fields.host),
            origin: fields.origin,
            authorization: fields.authorization,
            keeps_alive: is_new && !fields.closes,
            body: bytes.get(head..).unwrap_or_default(),
            length,
        })
    }
}

/// The headers that matter.
#[derive(Default)]
struct Fields<'a> {
    host: Option<&'a str>,
    origin: Option<&'a str>,
    authorization: Option<&'a str>,
    content_length: Option<&'a str>,
    closes: bool,
}

impl<'a> Fields<'a> {
    fn read(headers: &[httparse::Header<'a>]) -> Result<Self, Refusal> {
        let mut fields = Self::default();
        for header in headers {
            let value = || ascii(header.value).ok_or_else(|| bad("a header that is no ASCII"));
            let once = |field: &mut Option<&'a str>| match field.replace(value()?) {
                None => Ok(()),
                Some(_) => Err(bad("a header that is there twice")),
            };
            match header.name.to_ascii_lowercase().as_str() {
                "host" => once(&mut fields.host)?,
                "origin" => once(&mut fields.origin)?,
                "authorization" => once(&mut fields.authorization)?,
                "content-length" => once(&mut fields.content_length)?,
                "transfer-encoding" => {
                    return Err(refuse("501 Not Implemented", "a transfer encoding"));
                }
                "expect" => return Err(refuse("417 Expectation Failed", "an expectation")),
                "connection" => {
                    let mut options = value()?.split(',').map(trim);
                    fields.closes |= options.any(|option| option.eq_ignore_ascii_case("close"));
                }
                _ => {}
            }
        }
        Ok(fields)
    }

    fn content_length(&self) -> Result<usize, Refusal> {
        let Some(digits) = self.content_length else {
            return Ok(0);
        };
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(bad("a Content-Length that is no number"));
        }
        // A number that overflows is too large.
        Ok(digits.parse().unwrap_or(usize::MAX))
    }
}

fn ascii(value: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(value).ok()?;
    text.is_ascii().then(|| trim(text))
}

/// Removes the blanks of HTTP (RFC 9110, OWS) at both ends.
pub(super) fn trim(text: &str) -> &str {
    text.trim_matches([' ', '\t'])
}

/// Splits a target into its authority, if it is a whole URL, and its path with the query.
fn split_target(target: &str) -> Result<(Option<&str>, &str), Refusal> {
    if target.starts_with('/') {
        return Ok((None, target));
    }
    let scheme = target.get(..7).unwrap_or_default();
    let rest = target.get(7..).unwrap_or_default();
    if !scheme.eq_ignore_ascii_case("http://") || rest.is_empty() {
        return Err(bad("a target that is no path"));
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, target) = rest.split_at(end);
    match target {
        "" => Ok((Some(authority), "/")),
        target if target.starts_with('/') => Ok((Some(authority), target)),
        _ => Err(bad("a target without a path")),
    }
}

/// Returns the values of a query, each with its name: `%41` and `+` are decoded.
pub(super) fn parameters(query: &str) -> impl Iterator<Item = (String, String)> + '_ {
    query
        .split('&')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            (decoded(name), decoded(value))
        })
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        match (first, tail) {
            (b'+', _) => bytes.push(b' '),
            (b'%', &[high, low, ref behind @ ..]) => match (digit(high), digit(low)) {
                (Some(high), Some(low)) => {
                    bytes.push(high << 4 | low);
                    rest = behind;
                }
                _ => bytes.push(first),
            },
            _ => bytes.push(first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The head of an answer, with the headers that keep a browser from doing anything else with it.
pub(super) fn head(
    status: &str,
    kind: &str,
    length: Option<usize>,
    keeps_alive: bool,
    more: &str,
) -> String {
    let length = length.map(|length| format!("Content-Length: {length}\r\n"));
    let connection = if keeps_alive { "keep-alive" } else { "close" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{}Connection: {connection}\r\n\
         Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n\
         Referrer-Policy: no-referrer\r\nCross-Origin-Resource-Policy: same-origin\r\n\
         {more}\r\n",
        length.unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(bytes: &[u8]) -> &'static str {
        let mut framer = Requests::default();
        match framer.decode(bytes) {
            Ok(Decoded::Frame { .. }) => "200",
            Ok(_) => "more",
            Err(error) => {
                let refusal = error.get_ref().downcast_ref::<Refusal>();
                &refusal.expect("a refusal").status[..3]
            }
        }
    }

    #[test]
    fn whole_requests_are_frames_in_every_cut() {
        let stream: &[u8] = b"\r\nGET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\nPOST /kill HTTP/1.1\r\n\
                              Host: x\r\nContent-Length: 5\r\n\r\n7.3.1GET / HTTP/1.0\r\n\r\n";
        for piece in 1..=stream.len() {
            let (mut framer, mut buffer) = (Requests::default(), Vec::new());
            let mut seen = Vec::new();
            for bytes in stream.chunks(piece) {
                buffer.extend_from_slice(bytes);
                while !buffer.is_empty() {
                    let Ok(Decoded::Frame { payload, consumed }) = framer.decode(&buffer) else {
                        break;
                    };
                    let request = Request::parse(&buffer[payload]).expect("a request");
                    let body = request.body.to_vec();
                    seen.push((request.method, request.path.to_owned(), body));
                    buffer.drain(..consumed);
                }
            }
            assert!(buffer.is_empty());
            let expected = [
                (Method::Get, "/a".to_owned(), b"".to_vec()),
                (Method::Post, "/kill".to_owned(), b"7.3.1".to_vec()),
                (Method::Get, "/".to_owned(), b"".to_vec()),
            ];
            assert_eq!(seen, expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn what_could_be_understood_in_two_ways_is_refused() {
        let host = "GET / HTTP/1.1\r\nHost: x\r\n";
        let post = "POST / HTTP/1.1\r\nHost: x\r\n";
        for (request, expected) in [
            ("GET / HTTP/1.1\nHost: x\n\n".to_owned(), "400"),
            (
                "GET / HTTP/1.1\r\nHost: x\r\nA: b\n\r\n\r\n".to_owned(),
                "400",
            ),
            (
                "GET / HTTP/1.1\r\nHost: x\r\nA: b\rc\r\n\r\n".to_owned(),
                "400",
            ),
            ("\n".to_owned(), "400"),
            ("\r\n\nGET / HTTP/1.0\r\n\r\n".to_owned(), "400"),
            (format!("{host}A: b\r\n c\r\n\r\n"), "400"),
            (format!("{host}A : b\r\n\r\n"), "400"),
            (format!("{host}A: b\0\r\n\r\n"), "400"),
            (format!("{host}Host: x\r\n\r\n"), "400"),
            ("GET / HTTP/1.1\r\n\r\n".to_owned(), "400"),
            ("GET  / HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "400"),
            (
                format!("{post}Content-Length: 1\r\nContent-Length: 1\r\n\r\n"),
                "400",
            ),
            (format!("{post}Content-Length: 1, 1\r\n\r\n"), "400"),
            (format!("{post}Content-Length: +1\r\n\r\n"), "400"),
            (format!("{post}Content-Length: 0x1\r\n\r\n"), "400"),
            (format!("{post}Content-Length:\r\n\r\n"), "400"),
            // Blanks of Unicode are none of HTTP.
            (format!("{post}Content-Length: \u{2003}3\r\n\r\nabc"), "400"),
            (format!("{post}Content-Length: 3\u{a0}\r\n\r\nabc"), "400"),
            (
                "GET / HTTP/1.1\r\nHost: localhost\u{a0}\r\n\r\n".to_owned(),
                "400",
            ),
            (format!("{host}Connection: close\u{a0}\r\n\r\n"), "400"),
            (format!("{post}Content-Length: \t3 \r\n\r\nabc"), "200"),
            (format!("{post}Content-Length: 1025\r\n\r\n"), "413"),
            (
                format!("{post}Content-Length: {}\r\n\r\n", "9".repeat(30)),
                "413",
            ),
            (
                format!("{post}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
                "501",
            ),
            (
                format!("{post}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"),
                "501",
            ),
            (format!("{post}Transfer-Encoding : chunked\r\n\r\n"), "400"),
            (format!("{post}Expect: 100-continue\r\n\r\n"), "417"),
            (format!("{host}Content-Length: 1\r\n\r\nx"), "400"),
            (
                "PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n".to_owned(),
                "405",
            ),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), "505"),
            ("GET / HTTP/1.2\r\n\r\n".to_owned(), "505"),
            ("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "400"),
            ("CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "400"),
            ("GET http:// HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "400"),
            (
                "GET http://x?y HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
                "400",
            ),
            (
                "GET https://x/ HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
                "400",
            ),
            (format!("GET /{} ", "a".repeat(MAX_HEAD)), "431"),
            (format!("{host}{}\r\n", "A: b\r\n".repeat(64)), "431"),
            (format!("{host}A: {}", "b".repeat(MAX_HEAD)), "431"),
            (format!("{host}\r\n"), "200"),
            ("OPTIONS /x HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "200"),
            ("GET / HTTP/1.0\r\n\r\n".to_owned(), "200"),
            (format!("{post}Content-Length: 2\r\n\r\nx"), "more"),
            (host.to_owned(), "more"),
            ("\r".to_owned(), "more"),
        ] {
            assert_eq!(status(request.as_bytes()), expected, "{request:?}");
        }
    }

    /// A listener with another framing may deliver it.
    #[test]
    fn a_part_of_a_request_is_no_request() {
        let whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
        assert!(Request::parse(whole).is_ok());
        for length in 0..whole.len() {
            let refusal = Request::parse(&whole[..length]).expect_err("a part");
            assert_eq!(refusal, bad("no whole request"), "{length} bytes");
        }
    }

    #[test]
    fn a_whole_url_names_the_host() {
        let wire = b"GET http://a.example:80/x?y HTTP/1.1\r\nHost: b.example\r\n\r\n";
        let request = Request::parse(wire).expect("a request");
        let parts = (request.host, request.path, request.query);
        assert_eq!(parts, (Some("a.example:80"), "/x", "y"));
        let wire = b"GET HTTP://a HTTP/1.1\r\nHost: b\r\nConnection: x, Close\r\n\r\n";
        let request = Request::parse(wire).expect("a request");
        assert_eq!((request.host, request.path), (Some("a"), "/"));
        assert!(!request.keeps_alive);
    }

    #[test]
    fn a_query_is_decoded() {
        let all: Vec<_> = parameters("sort=age&&filter=a+b%3a%zz%4&x").collect();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let expected = [
            pair("sort", "age"),
            pair("filter", "a b:%zz%4"),
            pair("x", ""),
        ];
        assert_eq!(all, expected);
    }
}

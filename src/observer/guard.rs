//! Checks of a request: its host, the origin of its page, its token.

use std::net::IpAddr;

use super::http::{trim, Request};

/// A shorter token could be guessed.
pub(super) const MIN_TOKEN: usize = 16;

/// Whether a request for `host` is meant for this server. `local` is the address at which it came
/// in.
///
/// A page of another site may be served under a name that its owner points at 127.0.0.1 meanwhile
/// (DNS rebinding): the browser then takes this server for that site, but names it in `Host`.
pub(super) fn is_own_host(host: &str, local: Option<IpAddr>, allowed: &[String]) -> bool {
    let Some((name, _port)) = split_port(host) else {
        return false;
    };
    let is = |other: &str| name.eq_ignore_ascii_case(other);
    if is("localhost") || allowed.iter().any(|allowed| is(allowed)) {
        return true;
    }
    let literal = match name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'))
    {
        Some(inner) => inner.parse().ok().map(IpAddr::V6),
        None => name.parse().ok().map(IpAddr::V4),
    };
    literal.is_some_and(|literal| {
        let literal = literal.to_canonical();
        literal.is_loopback() || local.is_some_and(|local| local.to_canonical() == literal)
    })
}

/// Whether this can be the host of a request, without a port.
pub(super) fn is_name(host: &str) -> bool {
    let is_whole = |(name, _): (&str, &str)| name.len() == host.len();
    let is_visible = host.bytes().all(|byte| byte.is_ascii_graphic());
    is_visible && split_port(host).is_some_and(is_whole)
}

/// Splits a host into its name and its port. `None` if it is neither.
fn split_port(host: &str) -> Option<(&str, &str)> {
    let end = match host.strip_prefix('[') {
        Some(inner) => inner.find(']')? + 2,
        None => host.find(':').unwrap_or(host.len()),
    };
    let (name, port) = host.split_at_checked(end)?;
    let digits = match port {
        "" => port,
        port => port.strip_prefix(':')?,
    };
    let is_port = digits.len() <= 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
    (is_port && !name.is_empty()).then_some((name, digits))
}

/// Whether the page that sends the request is this server's: its origin is the host that it asks.
pub(super) fn is_own_origin(request: &Request<'_>) -> bool {
    let (Some(origin), Some(host)) = (request.origin, request.host) else {
        return false;
    };
    let authority = origin.strip_prefix("http://");
    let authority = authority.or_else(|| origin.strip_prefix("https://"));
    authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host))
}

/// Whether the request has the token, in a header `Authorization: Bearer TOKEN`.
pub(super) fn has_token(request: &Request<'_>, token: &str) -> bool {
    let given = request.authorization.and_then(|value| {
        let (scheme, given) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| trim(given))
    });
    given.is_some_and(|given| is_same(given.as_bytes(), token.as_bytes()))
}

/// Compares all bytes, so that the time does not tell how many are right.
fn is_same(one: &[u8], other: &[u8]) -> bool {
    let pairs = one.iter().zip(other);
    let difference = pairs.fold(0, |sum, (one, other)| {
        std::hint::black_box(sum | (one ^ other))
    });
    one.len() == other.len() && difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_names_are_hosts() {
        let local = Some(IpAddr::from([10, 0, 0, 7]));
        let allowed = ["stats.example".to_owned()];
        for (host, expected) in [
            ("localhost", true),
            ("LocalHost:9222", true),
            ("127.0.0.1:1", true),
            ("127.9.9.9", true),
            ("[::1]:9222", true),
            ("[::ffff:127.0.0.1]", true),
            ("10.0.0.7:80", true),
            ("stats.example", true),
            ("Stats.Example:443", true),
            ("10.0.0.8:80", false),
            ("evil.example", false),
            ("localhost.evil.example", false),
            ("evil.example:9222", false),
            ("127.0.0.1.evil.example", false),
            ("localhost@evil.example", false),
            ("localhost:x", false),
            ("localhost:9222:1", false),
            ("localhost:123456", false),
            ("[::1", false),
            ("[::1]x", false),
            ("::1", false),
            ("[localhost]", false),
            ("2130706433", false),
            ("", false),
            (":80", false),
            ("€:80", false),
        ] {
            assert_eq!(is_own_host(host, local, &allowed), expected, "{host:?}");
        }
        assert!(!is_own_host("10.0.0.7", None, &[]));
    }

    #[test]
    fn origin_and_token_are_compared_whole() {
        let with = |origin: &str, authorization: &str| {
            format!(
                "POST /kill HTTP/1.1\r\nHost: localhost:1\r\nOrigin: {origin}\r\n\
                 Authorization: {authorization}\r\n\r\n"
            )
        };
        for (origin, expected) in [
            ("http://localhost:1", true),
            ("https://LOCALHOST:1", true),
            ("http://localhost", false),
            ("http://localhost:12", false),
            ("null", false),
            ("http://evil.example", false),
        ] {
            let wire = with(origin, "x");
            let request = Request::parse(wire.as_bytes()).expect("a request");
            assert_eq!(is_own_origin(&request), expected, "{origin}");
        }
        let token = "0123456789abcdef";
        for (value, expected) in [
            ("Bearer 0123456789abcdef", true),
            ("bearer  0123456789abcdef", true),
            ("Bearer 0123456789abcdeF", false),
            ("Bearer 0123456789abcde", false),
            ("Bearer 0123456789abcdef0", false),
            ("Bearer", false),
            ("Basic 0123456789abcdef", false),
        ] {
            let wire = with("x", value);
            let request = Request::parse(wire.as_bytes()).expect("a request");
            assert_eq!(has_token(&request, token), expected, "{value}");
        }
    }
}

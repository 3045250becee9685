//! TLS, on real sockets and with clients of others.

mod adopted;
mod ciphers;
mod clients;
mod closing;
mod data;
mod handshakes;
mod live;
mod names;
mod openssl;
mod pem;
mod python;
mod records;
mod refused;
mod starttls;

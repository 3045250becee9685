//! Several servers that act as one.

mod cap;
mod ending;
mod places;
mod starved;
mod tls;
mod together;

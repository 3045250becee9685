//! What the model says, and that the code says the same.

mod code;
mod faults;
mod lassos;
mod properties;

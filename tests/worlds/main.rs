//! Whole worlds in the simulator: drawn from seeds, closed under every input, with every call failing, with handlers that misbehave.

mod failing_calls;
mod kqueue;
mod misbehaving;
mod own_descriptors;
mod simulation;
mod small_worlds;

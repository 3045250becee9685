//! Whole worlds in the simulator: drawn from seeds, closed under every input, with every call failing, with handlers that misbehave.

mod failing_calls;
mod misbehaving;
mod simulation;
mod small_worlds;

//! The life of a connection, incoming and outgoing: its bytes, its deadlines, its end.

mod all_is_read;
mod blocking_handlers;
mod bounded_turns;
mod closing;
mod connect;
mod connect_retry;
mod connect_tls;
mod deadlines;
mod detach;
mod drain;
mod durations;
mod framer_panics;
mod framing_on_the_wire;
mod full_queues;
mod gone_peers;
mod held_answers;
mod isolation;
mod large_frames;
mod memory_limit;
mod messages;
mod min_rate;
mod own_options;
mod payloads;
mod shared_descriptors;
mod slow_readers;
mod swap;

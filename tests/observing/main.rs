//! What can be seen of a server: counters, lists, alarms.

mod alarms;
mod histograms;
mod labels;
mod listener_traffic;
mod observer_drain;
mod observer_feed;
mod observer_http;
mod observer_slots;
mod observer_transports;
mod options_data;
mod queries;
mod recent_closes;
mod stats;
mod tree;

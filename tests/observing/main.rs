//! What can be seen of a server: counters, lists, alarms.

mod alarms;
mod histograms;
mod queries;
mod recent_closes;
mod stats;
mod tree;

//! What can be seen of a server: counters, lists, alarms.

mod alarms;
mod histograms;
mod labels;
mod queries;
mod recent_closes;
mod stats;
mod tree;

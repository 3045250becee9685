//! What is written about the code is true of it.

mod architecture;
mod dictionaries;
mod manual;
mod peers_table;
mod planted;

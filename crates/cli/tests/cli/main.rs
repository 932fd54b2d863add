//! The program as its users meet it: every command, its JSON and texts, and what it says to input that is wrong.
#![allow(missing_docs, reason = "tests")]

mod bad_input;
mod bad_models;
mod commands;
mod http;
mod hub;
mod inspect;
mod interrupts;
mod patterns;
mod relatives;
mod run;
mod servers;
mod support;

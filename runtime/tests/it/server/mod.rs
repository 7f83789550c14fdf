//! A whole replica over HTTP, in process: real tokenizer, template, engine and sampler over a device that knows the
//! alphabet.
#![allow(clippy::unwrap_used)]

mod alphabet;
mod any_input;
mod chat;
mod client;
mod completions;
mod connections;
mod embeddings;
mod errors;
mod gates;
mod worker;

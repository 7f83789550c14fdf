mod cpu;
mod engine;
mod server;

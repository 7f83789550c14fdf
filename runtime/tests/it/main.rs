mod cpu;
mod engine;
mod server;
mod weights;

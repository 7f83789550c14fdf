mod cpu;
mod engine;

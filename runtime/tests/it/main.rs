mod cpu;
mod engine;
mod weights;

//! Tests of the whole binary and of the house rules.

mod house;

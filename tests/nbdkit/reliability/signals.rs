//! Signals while requests are in flight.

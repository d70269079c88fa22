//! cow-limit, beside many writers.

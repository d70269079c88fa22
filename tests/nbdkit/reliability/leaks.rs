//! Many connections, one after the other: nothing is left of them.

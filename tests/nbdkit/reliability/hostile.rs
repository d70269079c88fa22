//! A client that breaks the rules of the protocol.

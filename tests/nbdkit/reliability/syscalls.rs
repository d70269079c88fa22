//! Every system call fails once.

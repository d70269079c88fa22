//! Full file systems, and a quota.

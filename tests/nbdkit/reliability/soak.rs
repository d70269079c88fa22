//! Everything at once, for as long as one likes.

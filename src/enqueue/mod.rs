//! enqueue: files and standard input → requests.

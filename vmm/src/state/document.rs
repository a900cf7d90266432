//! The state document's bytes: the one module that knows they are an FDT.

//! The causes of an error, which every error keeps as its source until somebody is to read it.

/// An error with all its causes, outermost first, each in its own words.
pub fn chain(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect()
}

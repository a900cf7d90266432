//! The chain of causes of an error, as texts to show to a user.

/// Returns the texts of an error and of all its causes, outermost first.
pub fn chain(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect()
}

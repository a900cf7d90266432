//! Checks that the tests that docs/restore-bugs.md names exist.

use std::path::Path;

#[test]
fn every_test_that_the_document_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let document = std::fs::read_to_string(root.join("docs/restore-bugs.md")).unwrap();
    let (mut file, mut found) = (None, 0);
    for line in document.lines().filter(|line| line.starts_with('|')) {
        // The words in backquotes: a file, then tests in this file.
        for word in line.split('`').skip(1).step_by(2) {
            if word.ends_with(".rs") {
                let text = std::fs::read_to_string(root.join(word));
                file = Some(text.unwrap_or_else(|error| panic!("{word}: {error}")));
            } else if word.contains('_') && !word.contains(':') {
                let text = file.as_ref().unwrap_or_else(|| panic!("{word} has no file"));
                // A test function, or a name in a suite's list of tests.
                let is_there = [format!("fn {word}("), format!("(\"{word}\"")];
                assert!(is_there.iter().any(|text_of| text.contains(text_of)), "no test {word}");
                found += 1;
            }
        }
    }
    assert!(found > 30, "only {found} tests are named");
}

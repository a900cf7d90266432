//! A handover as text.
//!
//! One line for each session, file and shared object, in the order of the tree:
//!
//! ```text
//! live update 3: 1 session, 2 files
//!   session web
//!     token 0    memfd-v2  data 0x1000
//!     token 999  memfd-v2  data 0x2000
//!   shared iommu-v1  data 0x3000  for 2 files
//! ```

use std::fmt;

use super::{FlbRecord, Handover, SessionRecord};

/// Text for people. It may change, so programs should not parse it.
impl fmt::Display for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, sessions, flbs } = self;
        write!(f, "live update {number}: {}", Count(sessions.len(), "session"))?;
        writeln!(f, ", {}", Count(self.file_count(), "file"))?;
        sessions.iter().try_for_each(|session| show_session(f, session))?;
        for FlbRecord { compatible, data, count } in flbs {
            let files = Count(usize::try_from(*count).unwrap_or(usize::MAX), "file");
            writeln!(f, "  shared {compatible}  data {data:#x}  for {files}")?;
        }
        Ok(())
    }
}

fn show_session(f: &mut fmt::Formatter<'_>, session: &SessionRecord) -> fmt::Result {
    let SessionRecord { name, files } = session;
    writeln!(f, "  session {name}")?;
    let token_width = files.iter().map(|file| file.token.to_string().len()).max().unwrap_or(0);
    let format_width =
        files.iter().map(|file| file.compatible.to_string().len()).max().unwrap_or(0);
    for file in files {
        let (token, format) = (file.token.to_string(), file.compatible.to_string());
        write!(f, "    token {token:<token_width$}  {format:<format_width$}")?;
        writeln!(f, "  data {:#x}", file.data)?;
    }
    Ok(())
}

/// Shows a number of things: the number, and the noun in singular or plural.
pub(in crate::builtin) struct Count(
    pub(in crate::builtin) usize,
    pub(in crate::builtin) &'static str,
);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(count, what) = self;
        write!(f, "{count} {what}{}", if *count == 1 { "" } else { "s" })
    }
}

#[cfg(test)]
mod tests {
    use super::super::FileRecord;
    use super::*;
    use crate::Token;
    use crate::builtin::label::{Compatible, Name};

    #[test]
    fn a_tree_is_shown_with_one_line_for_each_record() {
        let compatible = Compatible::new("memfd-v2").unwrap();
        let file = |token, data| FileRecord { compatible, data, token: Token(token) };
        let name = Name::new("web\n1").unwrap();
        let session = SessionRecord { name, files: vec![file(0, 0x1000), file(999, 0x2000)] };
        let iommu = Compatible::new("iommu-v1").unwrap();
        let flbs = vec![FlbRecord { compatible: iommu, data: 0x3000, count: 1 }];
        let shown = Handover { number: 3, sessions: vec![session], flbs }.to_string();
        assert_eq!(
            shown,
            "live update 3: 1 session, 2 files\n  \
               session web\\n1\n    \
                 token 0    memfd-v2  data 0x1000\n    \
                 token 999  memfd-v2  data 0x2000\n  \
               shared iommu-v1  data 0x3000  for 1 file\n"
        );
    }
}

//! The state of a [`Luo`] as text.
//!
//! Lists the sessions, their files, and whether each is retrieved; the kernel shows none of this.
//! One line for each session, with a line for each of its files below:
//!
//! ```text
//! live update: enabled, 2 so far, device open
//!   outgoing web: 1 file
//!     token 0  memfd-v2
//!   incoming db: retrieved, 2 files
//!     token 0  memfd-v2  retrieved
//!     token 7  memfd-v2  not retrieved
//! ```

use std::fmt;

use super::handler::{File, Retrieval};
use super::model::Luo;
use super::session::{IncomingSession, OutgoingSession, Reach};
use super::tree::show::Count;

/// Shows the state of a [`Luo`] to people. The text may change, so programs should not parse it.
#[derive(Debug, Clone, Copy)]
pub struct Status<'a, F>(&'a Luo<F>);

impl<F: File> Luo<F> {
    /// Returns the state as text for people.
    pub fn status(&self) -> Status<'_, F> {
        Status(self)
    }
}

impl<F: File> fmt::Display for Status<'_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let luo = self.0;
        if let Some(why) = luo.disabled() {
            let cause = std::error::Error::source(why).map(|cause| format!(": {cause}"));
            return writeln!(f, "live update: disabled: {why}{}", cause.unwrap_or_default());
        }
        let device = if luo.device.in_use { "open" } else { "closed" };
        write!(f, "live update: enabled, {} so far, device {device}", luo.liveupdate_number())?;
        if luo.is_handed_over() {
            write!(f, ", all handed over")?;
        }
        writeln!(f)?;
        luo.outgoing.iter().try_for_each(|session| self.outgoing(f, session))?;
        luo.incoming.iter().try_for_each(|session| self.incoming(f, session))?;
        for session in &luo.arrived {
            let files = Count(session.files.len(), "file");
            writeln!(f, "  incoming {}: waits for the device to be opened, {files}", session.name)?;
        }
        match luo.deserialize_error() {
            Some(errno) => writeln!(f, "  incoming sessions cannot be read: {errno}"),
            None => Ok(()),
        }
    }
}

impl<F: File> Status<'_, F> {
    fn outgoing(&self, f: &mut fmt::Formatter<'_>, session: &OutgoingSession<F>) -> fmt::Result {
        let OutgoingSession { name, files } = session;
        writeln!(f, "  outgoing {name}: {}", Count(files.len(), "file"))?;
        for (token, file) in files.iter() {
            let format = self.0.registry.handlers.compatible(file.handler());
            writeln!(f, "    token {token}  {format}")?;
        }
        Ok(())
    }

    fn incoming(&self, f: &mut fmt::Formatter<'_>, session: &IncomingSession<F>) -> fmt::Result {
        let IncomingSession { name, reach, files } = session;
        let state = match reach {
            Reach::Waiting => "not retrieved",
            Reach::Retrieved => "retrieved",
            Reach::Lost => "out of reach: closed, but could not be finished",
        };
        writeln!(f, "  incoming {name}: {state}, {}", Count(files.len(), "file"))?;
        for (token, file) in files.iter() {
            let format = self.0.registry.handlers.compatible(file.handler());
            write!(f, "    token {token}  {format}  ")?;
            match file.retrieval() {
                Retrieval::Never => writeln!(f, "not retrieved")?,
                Retrieval::Done(_) => writeln!(f, "retrieved")?,
                Retrieval::Failed(errno) => writeln!(f, "lost: {errno}")?,
            }
        }
        Ok(())
    }
}

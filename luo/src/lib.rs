//! Sessions that carry file descriptors from one kernel to the next.
//!
//! The Live Update Orchestrator (LUO) keeps named sessions. In the old kernel a process creates a
//! session and preserves fds in it, each under a token; after a kexec a process of the new kernel
//! retrieves the session by its name and each fd by its token, and finishes the session.
//!
//! ```text
//!   create_session -> Outgoing -- preserve* --> Outgoing == kexec ==> (waits in the new kernel)
//!                        |                                                   |
//!                        +-- drop: everything is unpreserved,         retrieve_session
//!                            nothing is lost                                 |
//!                                                                            v
//!            finish (consumes) <-- Incoming <-- retrieve* ----------- Incoming
//!                                     +-- drop: what was not retrieved is lost
//! ```
//!
//! [`Outgoing`] has no `retrieve` and [`Incoming`] no `preserve`: the wrong call does not compile.
//! Programs use any backend through [`Orchestrator`], in the same way. This crate knows neither virtual
//! machines nor kexec, and gives the fds no meaning.
//! Under systemd sessions can live in the service's fd store ([`systemd`]).
//! [`builtin`] is an orchestrator of this crate, for kernels without LUO: on a pool of memory that survives
//! a kexec ([`builtin::pool`]), or in one process ([`builtin::keeper`]).

pub mod builtin;
#[cfg(feature = "tools")]
pub mod emulate;
mod error;
#[cfg(all(any(test, fuzzing), feature = "tools"))]
pub mod fuzz;
mod ioctl;
pub mod kernel;
mod memory;
mod mutex;
mod name;
mod session;
pub mod systemd;
mod ticket;
mod token;
pub mod uapi;

pub use error::{Error, FinishError, FromFdError};
pub use memory::{executable_memfd, memfd};
pub use name::{NameError, SessionName};
/// The errno of a system call, as every [`Error`] carries it.
pub use rustix::io::Errno;
pub use session::{
    Backend, Copies, Incoming, Orchestrator, Outgoing, Preserve, Probe, Retrieve, Room, Session,
};
pub use ticket::{Ticket, TicketError};
pub use token::Token;

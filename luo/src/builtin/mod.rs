//! The built-in LUO: the orchestrator itself, for kernels that have none.
//!
//! [`Luo`] is one pure state machine. It has no fds and does no I/O: files are values of any type
//! that is a [`File`], what is done to them is done by a [`Handler`], requests come from a
//! [`Caller`](decode::Caller), and the switch takes bytes away and brings them back ([`tree`]).
//! What makes it reachable in the place of `/dev/liveupdate` is left to others. Two orchestrators are
//! built on it, which differ in where preserved memory is: a [`keeper`] and a [`pool`].
//!
//! ```text
//!   start --> open device --> create, retrieve --> sessions: preserve | retrieve, finish
//!     ^                                                |
//!     |   tree of the previous one                     v
//!     +------------------------- the next <------- reboot: freeze, write, finalize
//! ```
//!
//! ```
//! use luo::builtin::scripted::Script;
//! use luo::builtin::{Compatible, Luo, Name, Parameters};
//! use luo::{Errno, Token};
//!
//! let script = Script::new(); // instead of real files
//! let paper = || script.handler(Compatible::new("paper-v1").unwrap(), &[1], true);
//! let name = Name::new("web").unwrap().to_field();
//!
//! let mut old = Luo::start(Parameters::default(), || Err::<Vec<u8>, _>(Errno::NOENT));
//! old.register_handler(paper())?;
//! old.open_device()?;
//! let session = old.create_session(&name, |_| Ok(()))?;
//! old.preserve_fd(session, Token(1), Some(script.open(1, 4711)))?;
//! let mut tree = Vec::new();
//! old.reboot(|bytes| { tree = bytes.to_vec(); Ok(()) })?;
//!
//! let mut new = Luo::start(Parameters::default(), || Ok(tree));
//! new.register_handler(paper())?;
//! new.open_device()?;
//! let session = new.retrieve_session(&name, |_| Ok(()))?;
//! assert_eq!(new.retrieve_fd(session, Token(1))?.object, 4711);
//! new.finish(session)?;
//! # Ok::<(), Errno>(())
//! ```
//!
//! It behaves as Linux 7.3 does, and where 7.3 and the seed differ as 7.3, except on purpose:
//!
//! - A tree that cannot be read disables live update and says why ([`Disabled`]); Linux panics.
//! - `finalize`, which is the seed's, undoes all when it fails; the seed leaves sessions frozen.
//! - After the switch calls are answered ESHUTDOWN; Linux lets them wait for ever.
//! - A duplicate name never leaves anything behind. (Linux 7.3 grows its list first: with 51 sessions
//!   a refused name adds an empty block, over which the next kernel panics.)
//! - A retrieved session whose answer cannot be written is returned and can be retrieved again;
//!   Linux closes it, and what it holds is lost.
//! - Two files of one incoming session under one token make the device EIO; Linux takes the first.
//!   So do two shared objects of one format.
//! - A shared object cannot be bound to a handler that has files, whose count would be wrong.
//! - Work is by map: nothing takes longer because there are more sessions or files.
//!
//! Not modelled: that a handler's module cannot be pinned, and want of memory.

pub mod decode;
mod device;
mod direct;
mod file;
pub mod flb;
pub mod handler;
pub mod keeper;
pub mod label;
mod model;
mod open_file;
pub mod pool;
mod reboot;
#[cfg(feature = "tools")]
pub mod scripted;
mod session;
mod show;
pub mod tree;

pub use direct::HandOverError;
pub use flb::{Flb, FlbId};
pub use handler::{File, Handle, Handler, HandlerId, Retrieval};
pub use label::{Compatible, Name};
pub use model::{Disabled, Limits, Luo, Parameters};
pub use open_file::OpenFile;
pub use session::{Kind, SessionId};
pub use show::Status;

//! The built-in LUO: a Live Update Orchestrator in user space, for kernels without LUO.
//!
//! [`Luo`] is one pure state machine. It has no fds and does no I/O: a file is a value of any type
//! that implements [`File`], a [`Handler`] does all work on files, requests come from a
//! [`Caller`](decode::Caller), and sessions cross the switch as the bytes of a handover [`tree`].
//! How a program reaches the state machine instead of `/dev/liveupdate` is left to others. Two
//! orchestrators are built on it, a [`keeper`] and a [`pool`], which differ in where preserved
//! memory is.
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
//! It behaves as Linux 7.3 does, also where the seed (the first LUO, from the time of Linux 6.19)
//! behaves otherwise. These differences from Linux are intended:
//!
//! - A tree that cannot be read disables live update and says why ([`Disabled`]); Linux panics.
//! - A failure of `finalize`, a step that only the seed has, undoes the whole switch; the seed
//!   leaves the sessions frozen.
//! - After the switch, calls fail with ESHUTDOWN; Linux blocks them forever.
//! - Creating a session under a duplicate name changes nothing. (Linux 7.3 grows its list of blocks
//!   before it checks the name: with 51 sessions, the refused call leaves an empty block, over
//!   which the next kernel panics.)
//! - If the answer to RETRIEVE_SESSION cannot be written, the session can be retrieved again; Linux
//!   closes the session, and its contents are lost.
//! - If an incoming session has two files under one token, opening the device fails with EIO; Linux
//!   uses the first file. Two shared objects of one format are the same error.
//! - A shared object cannot be bound to a handler that already has files: the object's count of
//!   files would be wrong.
//! - Look-ups use maps: no operation takes longer because there are more sessions or files.
//!
//! Not modelled: a handler whose module cannot be pinned, and lack of memory.

pub mod decode;
mod device;
mod file;
pub mod flb;
pub mod handler;
mod in_process;
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

pub use flb::{Flb, FlbId};
pub use handler::{File, Handle, Handler, HandlerId, Retrieval};
pub use in_process::HandOverError;
pub use label::{Compatible, Name};
pub use model::{Disabled, Limits, Luo, Parameters};
pub use open_file::OpenFile;
pub use session::{SessionId, SessionKind};
pub use show::Status;

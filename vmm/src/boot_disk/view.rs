//! A view of a part of the disk: the whole disk or one partition. It is for reading, but for [`View::write_at`].
//!
//! A view reads whole aligned blocks, so that it also works on an image that was opened with `O_DIRECT`. It never
//! reads beyond its end, and refuses to read after the search's deadline. It may show some blocks with other contents
//! than they have on the disk: those that a file system's journal has for them.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::journal::Copies;

/// The strictest alignment that a disk asks for: of positions in the file, lengths, and buffers.
const ALIGNMENT: usize = 4096;
/// Bytes that a view reads at once.
const WINDOW: usize = 32 << 10;
/// Most reads that a probe notes.
const SERVED: usize = 1 << 16;

/// A part of the disk.
#[derive(Debug)]
pub(super) struct View {
    file: Arc<File>,
    /// First byte of the part on the disk.
    start: u64,
    /// Length of the part in bytes.
    bytes: u64,
    /// Where the next `Read::read` begins, in the part.
    position: u64,
    /// After this time nothing is read.
    deadline: Instant,
    /// What is shown in place of the disk's bytes.
    overlay: Option<Rc<Overlay>>,
    /// Watches what is read, and changes it.
    probe: Option<Rc<Probe>>,
    /// The bytes of the disk that were read last.
    window: Window,
}

/// Finds out which bytes of the disk a file consists of; see [`super::rewrite`]. Copies of an overlay are not
/// part of it.
#[derive(Debug, Default)]
pub(super) struct Probe {
    /// What was read: positions on the disk and lengths.
    pub(super) served: RefCell<Vec<(u64, usize)>>,
    /// What is shown in place of the disk's bytes: the position of its first byte on the disk, and the bytes.
    pub(super) change: Option<(u64, Vec<u8>)>,
}

impl Probe {
    /// Sees bytes of the disk that are read.
    fn pass(&self, position: u64, target: &mut [u8]) {
        let mut served = self.served.borrow_mut();
        if served.len() < SERVED {
            served.push((position, target.len()));
        }
        let Some((start, bytes)) = &self.change else { return };
        for (at, byte) in (position..).zip(target) {
            let offset = at.checked_sub(*start).and_then(|offset| usize::try_from(offset).ok());
            if let Some(changed) = offset.and_then(|offset| bytes.get(offset)) {
                *byte = *changed;
            }
        }
    }
}

/// Contents that a view shows in place of those on the disk.
#[derive(Debug, Clone)]
pub(super) struct Overlay {
    /// Size of the blocks in bytes.
    pub(super) block_size: u64,
    /// The blocks whose contents are elsewhere in the view.
    pub(super) blocks: Copies,
    /// The first bytes of the view.
    pub(super) head: Vec<u8>,
}

#[derive(Debug, Default)]
struct Window {
    /// Has the window at its first aligned address.
    buffer: Vec<u8>,
    /// First byte of the window in `buffer`.
    aligned: usize,
    /// First byte of the window on the disk.
    start: u64,
    /// Length of the window in bytes.
    bytes: usize,
}

impl View {
    /// The whole disk. Errors if its size cannot be found.
    pub(super) fn whole(file: File, deadline: Instant) -> io::Result<Self> {
        // Block devices have no length in their metadata; their end can be sought.
        let bytes = (&file).seek(SeekFrom::End(0))?;
        let (file, window) = (Arc::new(file), Window::default());
        Ok(Self {
            file,
            start: 0,
            bytes,
            position: 0,
            deadline,
            overlay: None,
            probe: None,
            window,
        })
    }

    /// A part of the disk that this view has no overlay for. `None` if it is not wholly inside.
    pub(super) fn part(&self, start: u64, bytes: u64) -> Option<Self> {
        let inside = start.checked_add(bytes)? <= self.bytes;
        let start = self.start.checked_add(start)?;
        let (file, deadline) = (self.file.clone(), self.deadline);
        let window = Window::default();
        let (overlay, probe, position) = (None, None, 0);
        inside.then_some(Self { file, start, bytes, position, deadline, overlay, probe, window })
    }

    /// Another view of the same part.
    pub(super) fn again(&self) -> Self {
        let Self { file, start, bytes, position: _, deadline, overlay, probe, window: _ } = self;
        let (file, overlay, probe) = (file.clone(), overlay.clone(), probe.clone());
        let (start, bytes, deadline, window) = (*start, *bytes, *deadline, Window::default());
        Self { file, start, bytes, position: 0, deadline, overlay, probe, window }
    }

    /// The same part with a probe.
    pub(super) fn probed(self, probe: Rc<Probe>) -> Self {
        Self { probe: Some(probe), ..self }
    }

    /// Writes to the disk, at a position in this part, and waits until it is durable.
    pub(super) fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let end = at.checked_add(bytes.len() as u64).filter(|end| *end <= self.bytes);
        let position = end.and_then(|_| self.start.checked_add(at));
        let position = position.ok_or(io::ErrorKind::InvalidInput)?;
        // Whole aligned blocks, for an image that was opened with O_DIRECT.
        let (head, alignment) = ((position % ALIGNMENT as u64) as usize, ALIGNMENT);
        let length = (head + bytes.len()).next_multiple_of(alignment);
        let mut buffer = vec![0; length + alignment];
        let aligned = buffer.as_ptr().align_offset(alignment);
        let buffer = buffer.get_mut(aligned..aligned.saturating_add(length));
        let buffer = buffer.ok_or(io::ErrorKind::OutOfMemory)?;
        let start = position - head as u64;
        self.file.read_exact_at(buffer, start)?;
        buffer[head..head + bytes.len()].copy_from_slice(bytes);
        self.file.write_all_at(buffer, start)?;
        self.file.sync_data()
    }

    /// The same part with an overlay.
    pub(super) fn over(self, overlay: Overlay) -> Self {
        Self { overlay: Some(Rc::new(overlay)), ..self }
    }

    /// First byte of the part on the disk.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.bytes
    }

    /// Fills `target` with the bytes from `at` on. Errors if the part ends before.
    pub(super) fn read_exact_at(&mut self, at: u64, target: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < target.len() {
            match self.read_at(at.saturating_add(done as u64), &mut target[done..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => done += count,
            }
        }
        Ok(())
    }

    /// Reads some bytes from `at` on. Returns 0 at the end of the part.
    fn read_at(&mut self, at: u64, target: &mut [u8]) -> io::Result<usize> {
        let Some(overlay) = self.overlay.take() else { return self.read_disk(at, target) };
        let read = self.read_over(&overlay, at, target);
        self.overlay = Some(overlay);
        read
    }

    /// The same with an overlay, in which this view itself has none.
    fn read_over(&mut self, overlay: &Overlay, at: u64, target: &mut [u8]) -> io::Result<usize> {
        let Overlay { block_size, blocks, head } = overlay;
        let found = usize::try_from(at).ok().and_then(|at| head.get(at..)).unwrap_or_default();
        if !found.is_empty() {
            let count = found.len().min(target.len());
            target[..count].copy_from_slice(&found[..count]);
            return Ok(count);
        }
        let (number, offset) = (at / block_size, (at % block_size) as usize);
        let most = (*block_size as usize - offset).min(target.len());
        let Some(copy) = blocks.get(&number).filter(|_| at < self.bytes) else {
            return self.read_disk(at, &mut target[..most]);
        };
        let mut block = vec![0; *block_size as usize];
        let probe = self.probe.take();
        let read = copy.read(self, &mut block);
        self.probe = probe;
        read?;
        target[..most].copy_from_slice(&block[offset..offset + most]);
        Ok(most)
    }

    /// The same without an overlay.
    fn read_disk(&mut self, at: u64, target: &mut [u8]) -> io::Result<usize> {
        let left = self.bytes.saturating_sub(at);
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(target.len());
        if most == 0 {
            return Ok(0);
        }
        let position = self.start.saturating_add(at);
        let found = self.window.get(position);
        let found = match found {
            Some(found) => found,
            None => {
                if Instant::now() > self.deadline {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "it takes too long"));
                }
                self.window.fill(&self.file, position)?;
                self.window.get(position).ok_or(io::ErrorKind::UnexpectedEof)?
            }
        };
        let count = found.len().min(most);
        target[..count].copy_from_slice(&found[..count]);
        if let Some(probe) = &self.probe {
            probe.pass(position, &mut target[..count]);
        }
        Ok(count)
    }
}

impl Window {
    /// The bytes from `position` on that the window has, if it has any.
    fn get(&self, position: u64) -> Option<&[u8]> {
        let offset = usize::try_from(position.checked_sub(self.start)?).ok()?;
        let found = self.buffer.get(self.aligned..)?.get(..self.bytes)?.get(offset..)?;
        (!found.is_empty()).then_some(found)
    }

    /// Reads the window in which `position` is.
    fn fill(&mut self, file: &File, position: u64) -> io::Result<()> {
        if self.buffer.is_empty() {
            self.buffer = vec![0; WINDOW + ALIGNMENT];
            self.aligned = self.buffer.as_ptr().align_offset(ALIGNMENT);
        }
        self.bytes = 0;
        self.start = position - position % ALIGNMENT as u64;
        let target = self.buffer.get_mut(self.aligned..self.aligned.saturating_add(WINDOW));
        let target = target.ok_or(io::ErrorKind::OutOfMemory)?;
        self.bytes = loop {
            match file.read_at(target, self.start) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        Ok(())
    }
}

impl Read for View {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let count = self.read_at(self.position, target)?;
        self.position += count as u64;
        Ok(count)
    }
}

/// Returns the position that a seek leads to, from `position` in a file of `bytes` bytes.
pub(super) fn sought(to: SeekFrom, position: u64, bytes: u64) -> io::Result<u64> {
    let sought = match to {
        SeekFrom::Start(position) => Some(position),
        SeekFrom::End(offset) => bytes.checked_add_signed(offset),
        SeekFrom::Current(offset) => position.checked_add_signed(offset),
    };
    Ok(sought.ok_or(io::ErrorKind::InvalidInput)?)
}

impl Seek for View {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.position = sought(to, self.position, self.bytes)?;
        Ok(self.position)
    }
}

/// `fatfs` asks for a disk that can be written; this one cannot.
impl Write for View {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ext4_view::Ext4Read for View {
    fn read(
        &mut self,
        start: u64,
        target: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.read_exact_at(start, target)?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn view(bytes: &[u8]) -> View {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        View::whole(file, Instant::now() + Duration::from_secs(60)).unwrap()
    }

    #[test]
    fn a_part_has_its_own_bytes_and_no_others() {
        let bytes: Vec<u8> = (0..100_000u32).map(|n| n as u8 ^ (n >> 8) as u8).collect();
        let whole = view(&bytes);
        let mut part = whole.part(1000, 70_000).unwrap();
        let mut read = Vec::new();
        part.read_to_end(&mut read).unwrap();
        assert_eq!(read, &bytes[1000..71_000]);
        let mut some = [0; 9];
        part.read_exact_at(69_991, &mut some).unwrap();
        assert_eq!(some, bytes[70_991..71_000]);
        assert!(part.read_exact_at(69_992, &mut some).is_err());
        assert!(part.read_exact_at(u64::MAX, &mut some).is_err());
        assert!(whole.part(30_001, 70_000).is_none());
        assert!(whole.part(u64::MAX, 2).is_none());
        assert!(part.part(0, 70_001).is_none());
    }

    #[test]
    fn nothing_is_read_after_the_deadline() {
        let late = View { deadline: Instant::now() - Duration::from_secs(1), ..view(&[7; 9]) };
        let error = { late }.read_exact_at(0, &mut [0; 9]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn nothing_is_written_by_a_reader_of_file_systems() {
        assert!(view(&[7; 9]).write(&[1]).is_err());
    }

    #[test]
    fn a_write_changes_its_bytes_and_no_others() {
        let bytes: Vec<u8> = (0..100_000u32).map(|n| n as u8 ^ (n >> 8) as u8).collect();
        let whole = view(&bytes);
        let part = whole.part(1000, 70_000).unwrap();
        part.write_at(8000, &[0; 6000]).unwrap();
        let mut now = Vec::new();
        whole.again().read_to_end(&mut now).unwrap();
        assert!(now[..9000] == bytes[..9000] && now[15_000..] == bytes[15_000..]);
        assert_eq!(now[9000..15_000], [0; 6000]);
        assert!(part.write_at(69_999, &[0; 2]).is_err() && part.write_at(u64::MAX, &[0]).is_err());
        let unchanged = whole.again().read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(unchanged, bytes.len());
    }
}

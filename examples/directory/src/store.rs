//! The files: one log for all topics and addresses, what is delayed, dead letters.
//!
//! ```text
//! <path>/<namespace>/lock                     held by whoever writes, for as long as a batch takes
//!                    log/00000000000000000017 the 17th message; numbers are positions and never given twice
//!                    delayed/<due>-<number>   moved to the end of the log when it is due
//!                    dead/<subscription>/<n>  dead letters
//!                    subscriptions/<name>/    spec.json, state.json, and a lock held by the active instance
//! ```
//!
//! A file appears under its name by `rename`, when all of it is on the disk: a reader never sees half of one.

use crate::error::{damaged, failed};
use crate::wire::Stored;
use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tidings_core::transport::Destination;
use tidings_core::{Result, SubscriptionName};

/// The files of one namespace; owned by the thread that works on them.
pub(crate) struct Store {
    root: PathBuf,
    lock: File,
    /// The last position known to be taken.
    end: u64,
    /// The last number given to what is not in the log.
    number: u64,
    /// Folders of which what was written last might not outlive the machine.
    unsynced: BTreeSet<PathBuf>,
}

/// What there is at a position of the log.
pub(crate) enum Read {
    Stored(Box<Stored>),
    Damaged(Damaged),
    /// Nothing, and there never will be: lost with the machine before it was confirmed, or deleted by hand.
    Hole,
    /// Nothing yet.
    End,
}

/// A file that cannot be read as a message.
#[derive(Debug)]
pub(crate) struct Damaged {
    pub(crate) path: PathBuf,
    pub(crate) bytes: Vec<u8>,
    pub(crate) why: &'static str,
}

impl Damaged {
    pub(crate) fn error(&self) -> tidings_core::Error {
        damaged(&self.path, self.why)
    }
}

impl Store {
    pub(crate) fn open(root: PathBuf) -> Result<Self> {
        for folder in ["log", "delayed", "dead", "subscriptions"] {
            create_folder(&root.join(folder))?;
        }
        let lock = open_lock(&root.join("lock"))?;
        let end = numbers(&root.join("log"))?.last().copied().unwrap_or(0);
        Ok(Self { root, lock, end, number: 0, unsynced: BTreeSet::new() })
    }

    fn log(&self) -> PathBuf {
        self.root.join("log")
    }

    fn delayed(&self) -> PathBuf {
        self.root.join("delayed")
    }

    pub(crate) fn dead(&self, name: &SubscriptionName) -> PathBuf {
        self.root.join("dead").join(name.as_str())
    }

    pub(crate) fn subscription(&self, name: &SubscriptionName) -> PathBuf {
        self.root.join("subscriptions").join(name.as_str())
    }

    pub(crate) fn is_subscription(&self, name: &SubscriptionName) -> Result<bool> {
        exists(&self.subscription(name).join("spec.json"))
    }

    /// Deletes what says that a subscription exists, and where it is.
    pub(crate) fn remove_subscription(&self, name: &SubscriptionName) -> Result<()> {
        let folder = self.subscription(name);
        for file in ["state.json", "spec.json"] {
            remove(&folder.join(file))?;
        }
        if exists(&folder)? { sync(&folder) } else { Ok(()) }
    }

    /// Deletes what the log has for the address of a subscription.
    pub(crate) fn forget_address(&mut self, name: &SubscriptionName) -> Result<()> {
        let to = Destination::Subscription(name.clone());
        for position in numbers(&self.log())? {
            let path = self.log_file(position);
            if let Some(Ok(stored)) = read(&path)?
                && stored.to == to
            {
                remove(&path)?;
            }
        }
        self.sync_log()
    }

    pub(crate) fn log_file(&self, position: u64) -> PathBuf {
        self.log().join(digits(position))
    }

    /// Does what must not be done by two at a time, in this process or another.
    pub(crate) fn locked<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let path = self.root.join("lock");
        self.lock.lock().map_err(failed(&path))?;
        let done = work(self);
        self.lock.unlock().map_err(failed(&path))?;
        done
    }

    // ---- Writing, under the lock; it lasts after `sync` ----

    /// Adds to the log.
    pub(crate) fn append(&mut self, stored: &Stored) -> Result<()> {
        let position = self.end()? + 1;
        self.write(&self.log(), &digits(position), &stored.encode())?;
        self.end = position;
        Ok(())
    }

    /// Adds to what moves to the log at the time it says it is received.
    pub(crate) fn delay(&mut self, stored: &Stored) -> Result<()> {
        let name = format!("{}-{}", digits(nanos(stored.received)), digits(self.next_number()));
        self.write(&self.delayed(), &name, &stored.encode())
    }

    /// Adds a dead letter.
    pub(crate) fn bury(&mut self, name: &SubscriptionName, stored: &Stored) -> Result<()> {
        let folder = self.dead(name);
        create_folder(&folder)?;
        let mut position = self.next_number();
        while exists(&folder.join(digits(position)))? {
            position = self.next_number();
        }
        self.write(&folder, &digits(position), &stored.encode())
    }

    /// Moves what is due to the end of the log, the earliest first.
    pub(crate) fn move_due(&mut self) -> Result<()> {
        if self.due()?.is_empty() {
            return Ok(());
        }
        self.locked(|store| {
            // Again, because others may have moved them meanwhile.
            for file in store.due()? {
                let position = store.end()? + 1;
                fs::rename(&file, store.log_file(position)).map_err(failed(&file))?;
                store.end = position;
            }
            store.unsynced.extend([store.log(), store.delayed()]);
            store.sync()
        })
    }

    fn due(&self) -> Result<Vec<PathBuf>> {
        let (folder, now) = (self.delayed(), digits(nanos(SystemTime::now())));
        let mut due = names(&folder)?;
        // Whatever else lies there is not ours.
        let ours = |name: &str| name.len() == 41 && name.bytes().all(|b| b.is_ascii_digit() || b == b'-');
        due.retain(|name| ours(name) && name.as_str() <= now.as_str());
        due.sort_unstable();
        Ok(due.into_iter().map(|name| folder.join(name)).collect())
    }

    /// Writes a file so that it is there whole or not at all.
    pub(crate) fn write(&mut self, folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
        replace(&self.root.join("writing"), &folder.join(name), bytes)?;
        self.unsynced.insert(folder.to_owned());
        Ok(())
    }

    /// Makes last what was written.
    pub(crate) fn sync(&mut self) -> Result<()> {
        while let Some(folder) = self.unsynced.first() {
            sync(folder)?;
            self.unsynced.pop_first();
        }
        Ok(())
    }

    /// Makes last what was read, whoever wrote it.
    pub(crate) fn sync_log(&self) -> Result<()> {
        sync(&self.log())
    }

    /// A number that grows, with the time, so that none comes twice.
    fn next_number(&mut self) -> u64 {
        self.number = nanos(SystemTime::now()).max(self.number + 1);
        self.number
    }

    // ---- Reading ----

    /// The last position, those that others wrote included.
    pub(crate) fn end(&mut self) -> Result<u64> {
        while exists(&self.log_file(self.end + 1))? {
            self.end += 1;
        }
        Ok(self.end)
    }

    pub(crate) fn read(&mut self, position: u64) -> Result<Read> {
        let path = self.log_file(position);
        match read(&path)? {
            Some(Ok(stored)) => Ok(Read::Stored(Box::new(stored))),
            Some(Err(damaged)) => Ok(Read::Damaged(damaged)),
            None if position <= self.end => Ok(Read::Hole),
            None => Ok(Read::End),
        }
    }
}

/// Reads a message; `None` if there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<Result<Stored, Damaged>>> {
    let Some(bytes) = read_bytes(path)? else { return Ok(None) };
    Ok(Some(Stored::decode(&bytes).map_err(|why| Damaged { path: path.to_owned(), bytes, why })))
}

pub(crate) fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(path)(error)),
    }
}

/// Writes `file`, by way of `temporary`, so that it is there whole or not at all; for sure when its folder is synced.
pub(crate) fn replace(temporary: &Path, file: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut writing = File::create(temporary)?;
        writing.write_all(bytes)?;
        writing.sync_all()?;
        fs::rename(temporary, file)
    };
    write().map_err(failed(file))
}

/// Makes what was created, renamed and removed in a folder last.
pub(crate) fn sync(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed(folder))
}

/// Creates a folder that lasts, if it is not there.
pub(crate) fn create_folder(folder: &Path) -> Result<()> {
    if exists(folder)? {
        return Ok(());
    }
    if let Some(parent) = folder.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        create_folder(parent)?;
    }
    fs::create_dir_all(folder).map_err(failed(folder))?;
    folder.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(Ok(()), sync)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(path)(error)),
        _ => Ok(()),
    }
}

fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(failed(path))
}

pub(crate) fn open_lock(path: &Path) -> Result<File> {
    File::options().create(true).truncate(false).write(true).open(path).map_err(failed(path))
}

/// Whether the lock is ours now; it is until the file is dropped, or the process dies.
pub(crate) fn try_lock(file: &File, path: &Path) -> Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(failed(path)(error)),
    }
}

/// The names of the files in a folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(failed(folder))?;
    Ok(entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// The files of a folder whose names are positions, ascending; there are none if there is no folder.
pub(crate) fn numbers(folder: &Path) -> Result<Vec<u64>> {
    if !exists(folder)? {
        return Ok(Vec::new());
    }
    let number = |name: String| name.parse().ok().filter(|number| *number < u64::MAX / 2 && digits(*number) == name);
    let mut numbers: Vec<u64> = names(folder)?.into_iter().filter_map(number).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// A number as the name of a file, so that names sort as numbers do.
pub(crate) fn digits(number: u64) -> String {
    format!("{number:020}")
}

/// Nanoseconds since 1970, as far as `u64` can count them: until 2554.
pub(crate) fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The time `delay` from now, however long that is.
pub(crate) fn after(delay: Duration) -> SystemTime {
    let far = Duration::from_secs(100 * 365 * 24 * 3600);
    SystemTime::now() + delay.min(far)
}

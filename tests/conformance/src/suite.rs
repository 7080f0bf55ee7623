//! Runs the cases, as a test without a harness or for a report.

use crate::Factory;
use crate::cases::{Case, all};
use crate::env::Env;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use std::any::Any;
use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, mpsc};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

/// Chooses the transports, by name and separated by commas, among those of a suite.
const TRANSPORTS: &str = "TIDINGS_TEST_TRANSPORTS";

/// How many cases run at a time unless `--test-threads` says: most of a case is waiting for its broker.
const AT_A_TIME: usize = 12;

/// How long the thread of a case may be blocked, in real time, where its own clock does not end it.
const BLOCKED: Duration = Duration::from_secs(60);

/// Held by all cases, and by those that must be alone for themselves.
static TURN: RwLock<()> = RwLock::new(());

/// A transport, and what its cases have together.
#[derive(Clone)]
struct Entry {
    factory: Arc<dyn Factory>,
    /// Held by its cases, and by those that restart its broker for themselves.
    turn: Arc<RwLock<()>>,
    /// How many of them were not skipped.
    executed: Arc<AtomicUsize>,
}

/// The cases, on one or more transports.
///
/// # Examples
///
/// ```no_run
/// # fn my_factory() -> impl tidings_conformance::Factory { struct F; #[async_trait::async_trait] impl tidings_conformance::Factory for F {
/// # fn name(&self) -> &'static str { "x" } async fn open(&self, _: &str) -> tidings_core::Result<std::sync::Arc<dyn tidings_conformance::Broker>> { todo!() } } F }
/// fn main() -> std::process::ExitCode {
///     tidings_conformance::Suite::new().with(my_factory()).main()
/// }
/// ```
#[must_use = "a suite does nothing until it is run"]
pub struct Suite {
    entries: Vec<(Entry, bool)>,
    pace: Pace,
}

/// How time passes for a case.
#[derive(Clone, Copy)]
struct Pace {
    deadline: Duration,
    paused: bool,
}

/// How the cases ended.
#[derive(Debug, Default)]
pub struct Report {
    /// The names of those that passed, such as `publish::confirmed_means_kept`.
    pub passed: Vec<String>,
    /// Those that failed, with what they said.
    pub failed: Vec<(String, String)>,
    /// Those that were skipped, with the reason.
    pub skipped: Vec<(String, String)>,
}

enum Ended {
    Passed,
    Failed(String),
    Skipped(String),
}

impl Default for Suite {
    fn default() -> Self {
        Self::new()
    }
}

impl Suite {
    /// A suite without a transport.
    pub fn new() -> Self {
        Self { entries: Vec::new(), pace: Pace { deadline: Duration::from_secs(300), paused: false } }
    }

    /// Runs the cases on this transport too.
    pub fn with(mut self, factory: impl Factory) -> Self {
        self.entries.push((Entry::new(factory), true));
        self
    }

    /// Runs the cases on this transport too, if `TIDINGS_TEST_TRANSPORTS` names it.
    pub fn with_requested(mut self, factory: impl Factory) -> Self {
        self.entries.push((Entry::new(factory), false));
        self
    }

    /// How long a case may take. Default: 5 minutes.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.pace.deadline = deadline;
        self
    }

    /// Time passes at once whenever all wait for it, as under `tokio::time::pause`: for transports that live in this
    /// process and take the time from tokio.
    pub fn in_virtual_time(mut self) -> Self {
        self.pace.paused = true;
        self
    }

    /// Runs as a test without a harness: takes the arguments of `cargo test`, and `TIDINGS_TEST_TRANSPORTS=a,b`.
    pub fn main(self) -> ExitCode {
        let mut arguments = Arguments::from_args();
        arguments.test_threads.get_or_insert(AT_A_TIME);
        let entries = match self.requested() {
            Ok(entries) => entries,
            Err(why) => {
                eprintln!("error: {why}");
                return ExitCode::FAILURE;
            }
        };
        // In no order, so that neither one broker nor the processors have all their work at once; and last those that let nothing run
        // beside them.
        let each = |case| entries.iter().map(move |entry| (case, entry));
        let mut cases: Vec<(&Case, &Entry)> = all().flat_map(each).collect();
        let spread = BuildHasherDefault::<DefaultHasher>::default();
        cases.sort_by_key(|(case, entry)| {
            (case.is_alone(), case.restarts(), spread.hash_one((case.name(), entry.factory.name())))
        });
        let trials = cases.into_iter().map(|(case, entry)| trial(case, entry.clone(), self.pace)).collect();
        let conclusion = libtest_mimic::run(&arguments, trials);
        if conclusion.has_failed() {
            return ExitCode::FAILURE;
        }
        // Nothing that was asked for may go untested unseen. A filter asks for less.
        let whole = arguments.filter.is_none() && arguments.skip.is_empty() && !arguments.list && !arguments.ignored;
        let idle = entries.iter().find(|entry| entry.executed.load(SeqCst) == 0);
        match idle.filter(|_| whole) {
            Some(entry) => {
                eprintln!("error: no case was executed on {}", entry.factory.name());
                ExitCode::FAILURE
            }
            None => ExitCode::SUCCESS,
        }
    }

    /// Runs those cases whose name contains one of `filters` (all if there are none) on all its transports, one after
    /// another.
    #[must_use]
    pub fn report(&self, filters: &[&str]) -> Report {
        let mut report = Report::default();
        for (entry, _) in &self.entries {
            let wanted = |case: &&'static Case| filters.is_empty() || filters.iter().any(|f| case.name().contains(f));
            for case in all().filter(wanted) {
                report.add(case.name(), run(case, entry, self.pace));
            }
        }
        report
    }

    fn requested(&self) -> Result<Vec<Entry>, String> {
        let Ok(names) = std::env::var(TRANSPORTS) else {
            return Ok(self
                .entries
                .iter()
                .filter(|(_, by_default)| *by_default)
                .map(|(entry, _)| entry.clone())
                .collect());
        };
        let find = |name: &str| {
            let found = self.entries.iter().find(|(entry, _)| entry.factory.name() == name);
            found.map(|(entry, _)| entry.clone()).ok_or_else(|| {
                format!("{TRANSPORTS} names `{name}`; known are {}", self.names().collect::<Vec<_>>().join(", "))
            })
        };
        names.split(',').map(str::trim).filter(|name| !name.is_empty()).map(find).collect()
    }

    fn names(&self) -> impl Iterator<Item = &'static str> {
        self.entries.iter().map(|(entry, _)| entry.factory.name())
    }
}

impl fmt::Debug for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}

impl Entry {
    fn new(factory: impl Factory) -> Self {
        Self { factory: Arc::new(factory), turn: Arc::default(), executed: Arc::default() }
    }
}

impl Report {
    fn add(&mut self, name: String, ended: Ended) {
        match ended {
            Ended::Passed => self.passed.push(name),
            Ended::Failed(why) => self.failed.push((name, why)),
            Ended::Skipped(why) => self.skipped.push((name, why)),
        }
    }
}

fn trial(case: &'static Case, entry: Entry, pace: Pace) -> Trial {
    let name = format!("{}::{}", entry.factory.name(), case.name());
    Trial::ignorable_test(name, move || match run(case, &entry, pace) {
        Ended::Passed => {
            entry.executed.fetch_add(1, SeqCst);
            Ok(Completion::Completed)
        }
        Ended::Failed(why) => Err(Failed::from(why)),
        Ended::Skipped(why) => Ok(Completion::ignored_with(why)),
    })
}

/// Runs a case in a runtime and a namespace of its own. Poisoned turns mean that another case has failed.
fn run(case: &'static Case, entry: &Entry, pace: Pace) -> Ended {
    let _all = Turn::take(&TURN, case.is_alone());
    let _of_this_broker = Turn::take(&entry.turn, case.restarts());
    // On a thread of its own, so that a case that blocks is left behind too, whatever its clock says.
    let (sender, receiver) = mpsc::channel();
    let factory = Arc::clone(&entry.factory);
    std::thread::spawn(move || drop(sender.send(run_here(case, &factory, pace))));
    let patience = if pace.paused { BLOCKED } else { pace.deadline + BLOCKED };
    receiver
        .recv_timeout(patience)
        .unwrap_or_else(|_| Ended::Failed(format!("it has blocked its thread for {patience:?}")))
}

/// A lock that is held.
enum Turn<'a> {
    WithOthers { _held: RwLockReadGuard<'a, ()> },
    Alone { _held: RwLockWriteGuard<'a, ()> },
}

impl<'a> Turn<'a> {
    fn take(lock: &'a RwLock<()>, alone: bool) -> Self {
        match alone {
            true => Self::Alone { _held: lock.write().unwrap_or_else(PoisonError::into_inner) },
            false => Self::WithOthers { _held: lock.read().unwrap_or_else(PoisonError::into_inner) },
        }
    }
}

fn run_here(case: &Case, factory: &Arc<dyn Factory>, pace: Pace) -> Ended {
    let runtime = match runtime(pace) {
        Ok(runtime) => runtime,
        Err(error) => return Ended::Failed(format!("no runtime: {error}")),
    };
    let timed = async { timeout(pace.deadline, attempt(case, factory, pace)).await };
    let ended = catch_unwind(AssertUnwindSafe(|| runtime.block_on(timed)));
    // What hangs is left behind.
    runtime.shutdown_background();
    match ended {
        Ok(Ok(ended)) => ended,
        Ok(Err(_)) => Ended::Failed(format!("it has not ended within {:?}", pace.deadline)),
        Err(panic) => Ended::Failed(said(&*panic)),
    }
}

fn runtime(pace: Pace) -> std::io::Result<Runtime> {
    if pace.paused {
        return Builder::new_current_thread().enable_all().start_paused(true).build();
    }
    Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

async fn attempt(case: &Case, factory: &Arc<dyn Factory>, pace: Pace) -> Ended {
    let env = match Env::open(Arc::clone(factory), pace.paused).await {
        Ok(env) => env,
        Err(error) => return Ended::Failed(format!("the broker cannot be reached: {}", with_causes(&error))),
    };
    if let Some(why) = case.needs.iter().find_map(|need| need.lacking(&env)) {
        return Ended::Skipped(why);
    }
    // A task, so that what it left is cleaned up although it panicked.
    let ended = tokio::spawn((case.run)(env.clone())).await;
    let cleaned = env.clean_up().await;
    match (ended, cleaned) {
        (Err(panic), _) if panic.is_panic() => Ended::Failed(said(&*panic.into_panic())),
        (Err(cancelled), _) => Ended::Failed(cancelled.to_string()),
        (Ok(()), Err(error)) => Ended::Failed(format!("the clean-up: {}", with_causes(&error))),
        (Ok(()), Ok(())) => Ended::Passed,
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}

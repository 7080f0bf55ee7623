//! A real broker of a test's own, by `scripts/brokers`: on ports and in a folder that nobody else uses.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use tidings_core::{Error, ErrorKind, Result};

/// Ports for servers, of which nobody else uses any now.
///
/// They are below those that the system gives to outgoing connections. A client that tries again and again to reach a server that is down
/// is else connected with itself one day, by a port that happens to be the server's, which then finds it taken.
///
/// # Errors
/// None are found.
pub fn free_ports(count: usize) -> io::Result<Vec<u16>> {
    // None is given away twice: what it was given to may not hold it yet.
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().expect("no panic inside");
    let (mut ports, mut last) = (Vec::with_capacity(count), io::Error::from(io::ErrorKind::AddrInUse));
    for _ in 0..10_000 {
        if ports.len() == count {
            return Ok(ports);
        }
        let port = fastrand::u16(10_000..17_000);
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(_) if given.insert(port) => ports.push(port),
            Ok(_) => {}
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// As [`free_ports`], of one.
///
/// # Errors
/// None is found.
pub fn free_port() -> io::Result<u16> {
    Ok(free_ports(1)?[0])
}

/// A broker that was started for this process; dropped, it is stopped and its data removed. That is in `TIDINGS_TEST_DATA`, or where
/// temporary files are.
#[derive(Debug)]
pub struct Server {
    broker: &'static str,
    state: PathBuf,
    variables: Vec<(String, String)>,
    url: String,
}

impl Server {
    /// Installs (once) and starts `nats`, `rabbitmq` or `kafka`. Blocks until it answers.
    ///
    /// # Errors
    /// What `scripts/brokers` said, in one line.
    pub fn start(broker: &'static str) -> io::Result<Self> {
        Self::start_with(broker, Vec::new())
    }

    /// A Kafka broker with `count` more listeners, and for each its port and the port of the proxy that it tells its clients.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_proxied_kafka(count: usize) -> io::Result<(Self, Vec<(u16, u16)>)> {
        let ports = free_ports(count * 2)?;
        let pairs: Vec<(u16, u16)> = ports.chunks(2).map(|pair| (pair[0], pair[1])).collect();
        let told: Vec<_> = pairs.iter().map(|(port, proxy)| format!("{port}:{proxy}")).collect();
        let server = Self::start_with("kafka", vec![("TIDINGS_TEST_KAFKA_PROXIED".into(), told.join(","))])?;
        Ok((server, pairs))
    }

    /// A Kafka broker that also takes the user `shop` with this password, by any login; and where.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_kafka_with_password(password: &str) -> io::Result<(Self, SocketAddr)> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let sasl = format!("{}:{password}", address.port());
        Ok((Self::start_with("kafka", vec![("TIDINGS_TEST_KAFKA_SASL".into(), sasl)])?, address))
    }

    /// A Kafka broker that also speaks TLS, as `server.pem` (key and certificate), to clients that `ca.pem` has signed, both in this
    /// folder; and its port.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_kafka_with_tls(folder: &Path) -> io::Result<(Self, u16)> {
        let port = free_port()?;
        let tls = format!("{port}:{}", folder.display());
        Ok((Self::start_with("kafka", vec![("TIDINGS_TEST_KAFKA_TLS".into(), tls)])?, port))
    }

    /// As [`start`](Self::start), with more variables for `scripts/brokers`.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(broker: &'static str, more: Vec<(String, String)>) -> io::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let state = format!("tidings-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let ports = match broker {
            "rabbitmq" => &["RABBITMQ", "RABBITMQ_STREAM", "RABBITMQ_DIST", "RABBITMQ_EPMD"][..],
            "kafka" => &["KAFKA", "KAFKA_CONTROLLER"],
            _ => &["NATS"],
        };
        let free = free_ports(ports.len())?;
        let variable = |(name, port): (&&str, u16)| (format!("TIDINGS_TEST_{name}_PORT"), port.to_string());
        let mut variables: Vec<_> = ports.iter().zip(free).map(variable).collect();
        variables.extend(more);
        let data = std::env::var_os("TIDINGS_TEST_DATA").map_or_else(std::env::temp_dir, PathBuf::from);
        let mut server = Self { broker, state: data.join(state), variables, url: String::new() };
        RUNNING.lock().expect("no panic inside").push((broker, server.state.clone()));
        server.up()?;
        server.url = server.run("url")?.trim().to_owned();
        Ok(server)
    }

    /// One for all tests of this process that run at the same time; the last one to drop it stops it.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    ///
    /// # Panics
    /// If a test panicked in it.
    pub fn shared(broker: &'static str) -> io::Result<Arc<Self>> {
        static SHARED: Mutex<Vec<(&str, Weak<Server>)>> = Mutex::new(Vec::new());
        let mut shared = SHARED.lock().expect("no panic inside");
        shared.retain(|(_, server)| server.strong_count() > 0);
        let running = shared.iter().find(|(name, _)| *name == broker).and_then(|(_, server)| server.upgrade());
        if let Some(server) = running {
            return Ok(server);
        }
        let server = Arc::new(Self::start(broker)?);
        shared.push((broker, Arc::downgrade(&server)));
        Ok(server)
    }

    /// What to connect to.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where its data and settings are; RabbitMQ sees it as `/var/lib/rabbitmq`, and takes `extra.conf` there with its next start.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.state.join(self.broker)
    }

    /// Runs a tool of the broker's own, such as `rabbitmqctl`, and says what it said.
    ///
    /// # Errors
    /// It fails, or the broker has none.
    pub fn tool(&self, command: &[&str]) -> io::Result<String> {
        let mut script = self.command("tool");
        output(script.args(command))
    }

    /// Kills it with -9; its data stays.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&self) -> io::Result<()> {
        self.run("kill").map(drop)
    }

    /// Starts it again, on the data it had. Blocks until it answers.
    ///
    /// # Errors
    /// It does not start.
    pub fn up(&self) -> io::Result<()> {
        self.run("up").map(drop)
    }

    /// Stops it in order and starts it again.
    ///
    /// # Errors
    /// It does not start.
    pub fn restart(&self) -> io::Result<()> {
        self.run("restart").map(drop)
    }

    fn run(&self, what: &str) -> io::Result<String> {
        output(&mut self.command(what))
    }

    fn command(&self, what: &str) -> Command {
        let mut command = script();
        command.args([what, self.broker]).env("TIDINGS_TEST_STATE", &self.state).envs(self.variables.iter().cloned());
        command
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        stop(self.broker, &self.state);
    }
}

/// The brokers that this process has started and not stopped, with their folders.
static RUNNING: Mutex<Vec<(&str, PathBuf)>> = Mutex::new(Vec::new());

/// Stops all that this process has started, whoever holds them: for the end of `main`, where what a hung case has left behind does
/// not end.
///
/// # Panics
/// If a test panicked in it.
pub fn stop_all() {
    loop {
        let Some((broker, state)) = RUNNING.lock().expect("no panic inside").last().cloned() else { return };
        stop(broker, &state);
    }
}

fn stop(broker: &str, state: &Path) {
    RUNNING.lock().expect("no panic inside").retain(|(_, running)| running != state);
    if let Err(error) = output(script().args(["down", broker]).env("TIDINGS_TEST_STATE", state)) {
        eprintln!("{broker} was not stopped: {error}");
    }
    let _ = std::fs::remove_dir_all(state);
}

fn script() -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/brokers"));
    command.stdin(Stdio::null());
    for broker in ["NATS", "RABBITMQ", "KAFKA"] {
        // Somebody's broker in the environment is not this test's.
        command.env_remove(format!("TIDINGS_TEST_{broker}_URL"));
    }
    command
}

fn output(command: &mut Command) -> io::Result<String> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(said.lines().collect::<Vec<_>>().join("; ")))
}

/// A server of a suite's own, started when it is first asked for; or the one that `TIDINGS_TEST_<BROKER>_URL` names, which is
/// not ours to restart.
#[derive(Debug)]
pub struct OnDemand {
    broker: &'static str,
    started: Mutex<Option<Arc<Server>>>,
}

impl OnDemand {
    /// Of `nats`, `rabbitmq` or `kafka`.
    #[must_use]
    pub const fn new(broker: &'static str) -> Self {
        Self { broker, started: Mutex::new(None) }
    }

    fn named(&self) -> Option<String> {
        std::env::var(format!("TIDINGS_TEST_{}_URL", self.broker.to_uppercase())).ok()
    }

    /// Its URL, and the server if it was started here. Blocks until it answers.
    ///
    /// # Errors
    /// It cannot be installed or started.
    ///
    /// # Panics
    /// If a test panicked in it.
    pub fn get(&self) -> Result<(String, Option<Arc<Server>>)> {
        if let Some(url) = self.named() {
            return Ok((url, None));
        }
        tokio::task::block_in_place(|| {
            let mut started = self.started.lock().expect("no panic inside");
            let server = match &*started {
                Some(server) => Arc::clone(server),
                None => Arc::new(Server::start(self.broker).map_err(failed)?),
            };
            *started = Some(Arc::clone(&server));
            Ok((server.url().to_owned(), Some(server)))
        })
    }

    /// Why it cannot be restarted; `None` if it can.
    #[must_use]
    pub fn cannot_restart(&self) -> Option<&'static str> {
        self.named().map(|_| "the server that the environment names is not ours to restart")
    }
}

/// Kills it with -9 and starts it again. Blocks until it answers.
///
/// # Errors
/// It does not start.
pub fn kill_and_restart(server: Option<&Arc<Server>>) -> Result<()> {
    let Some(server) = server else { return Ok(()) };
    tokio::task::block_in_place(|| server.kill().and_then(|()| server.up())).map_err(failed)
}

fn failed(error: io::Error) -> Error {
    Error::new(ErrorKind::Connection, "no server could be started").with_source(error)
}

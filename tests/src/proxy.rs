//! A TCP proxy in front of a broker: cuts, stalls, delays and slows what passes, in both directions.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The most that is read at a time, so that a slow proxy passes it in small steps.
const CHUNK: usize = 16 * 1024;

/// How what passes is treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weather {
    /// Nothing passes, but connections stay open and new ones are taken.
    pub stalled: bool,
    /// New connections are closed at once.
    pub refusing: bool,
    /// How much later everything arrives.
    pub delay: Duration,
    /// The most bytes a second in each direction of each connection; 0 for no limit.
    pub bytes_per_second: u32,
    /// Grows with each cut: connections of before are closed.
    cut: u32,
}

/// A proxy on a port of its own; dropped, it closes everything.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// Listens on 127.0.0.1 and passes everything to `broker`.
    ///
    /// # Errors
    /// No port is free.
    pub async fn start(broker: SocketAddr) -> io::Result<Self> {
        Self::start_at(0, broker).await
    }

    /// As [`start`](Self::start), on a port that the broker tells its clients.
    ///
    /// # Errors
    /// The port is taken.
    pub async fn start_at(port: u16, broker: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port)).await?;
        let (address, weather) = (listener.local_addr()?, watch::Sender::new(Weather::default()));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, broker, weather.subscribe()));
        Ok(Self { address, weather, _tasks: tasks })
    }

    /// Where to connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes all connections, with what is on its way in them.
    pub fn cut(&self) {
        self.weather.send_modify(|weather| weather.cut += 1);
    }

    /// Changes how what passes is treated, from now on.
    pub fn set(&self, change: impl FnOnce(&mut Weather)) {
        self.weather.send_modify(change);
    }
}

async fn serve(listener: TcpListener, broker: SocketAddr, weather: watch::Receiver<Weather>) {
    // With the listener all connections end.
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        if !weather.borrow().refusing {
            connections.spawn(connection(client, broker, weather.clone()));
        }
    }
}

async fn connection(client: TcpStream, broker: SocketAddr, mut weather: watch::Receiver<Weather>) {
    let Ok(server) = TcpStream::connect(broker).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let cut = weather.borrow_and_update().cut;
    let (up, down) = (weather.clone(), weather.clone());
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        _ = weather.wait_for(|weather| weather.cut != cut) => {}
        () = pass(from_client, to_server, up) => {}
        () = pass(from_server, to_client, down) => {}
    }
}

/// Passes one direction until it ends. What is delayed stays in order; a queue of it is bounded by the reader's pace.
async fn pass(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin + Send + 'static,
    mut flow: watch::Receiver<Weather>,
) {
    let seen = flow.clone();
    let (sender, mut receiver) = tokio::sync::mpsc::channel::<(tokio::time::Instant, Vec<u8>)>(256);
    let reading = async move {
        let mut chunk = vec![0; CHUNK];
        while let Ok(read @ 1..) = from.read(&mut chunk).await {
            let due = tokio::time::Instant::now() + seen.borrow().delay;
            if sender.send((due, chunk[..read].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let writing = async {
        while let Some((due, bytes)) = receiver.recv().await {
            tokio::time::sleep_until(due).await;
            if flow.wait_for(|weather| !weather.stalled).await.is_err() {
                return;
            }
            let rate = flow.borrow().bytes_per_second;
            if rate > 0 {
                tokio::time::sleep(Duration::from_secs_f64(bytes.len() as f64 / f64::from(rate))).await;
            }
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    // What was read is still written when the reader has ended.
    tokio::select! {
        () = writing => {}
        () = async { reading.await; std::future::pending().await } => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test fails by panicking
    use super::*;
    use tokio::time::{Instant, timeout};

    /// A server that says everything back, and a proxy before it.
    async fn echo() -> (Proxy, JoinSet<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = JoinSet::new();
        server.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
        });
        (Proxy::start(address).await.unwrap(), server)
    }

    async fn say(stream: &mut TcpStream, text: &[u8]) -> io::Result<Vec<u8>> {
        stream.write_all(text).await?;
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn what_is_said_passes_late_not_at_all_or_in_pieces() {
        let (proxy, _server) = echo().await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(say(&mut stream, b"hello").await.unwrap(), b"hello");
        proxy.set(|weather| weather.delay = Duration::from_millis(50));
        let start = Instant::now();
        say(&mut stream, b"late").await.unwrap();
        assert!(start.elapsed() >= Duration::from_millis(100), "both ways");
        proxy.set(|weather| (weather.delay, weather.stalled) = (Duration::ZERO, true));
        assert!(timeout(Duration::from_millis(100), say(&mut stream, b"x")).await.is_err());
        proxy.set(|weather| weather.stalled = false);
        let mut answer = [0];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"x", "it was kept");
        proxy.set(|weather| weather.bytes_per_second = 10_000);
        let start = Instant::now();
        say(&mut stream, &[0; 1000]).await.unwrap();
        assert!(start.elapsed() >= Duration::from_millis(200), "both ways");
    }

    #[tokio::test]
    async fn a_cut_ends_what_is_open_and_nothing_else() {
        let (proxy, _server) = echo().await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        say(&mut stream, b"hello").await.unwrap();
        proxy.cut();
        assert!(say(&mut stream, b"gone").await.is_err());
        let mut again = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(say(&mut again, b"hello").await.unwrap(), b"hello");
        proxy.set(|weather| weather.refusing = true);
        proxy.cut();
        let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(say(&mut refused, b"hello").await.is_err());
    }
}

//! A TCP proxy that loses answers, cuts connections, and delivers requests when nobody waits for them any longer.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::timeout,
};

/// What happens to what goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// It goes through.
    Fair,
    /// Requests arrive, answers do not.
    Mute,
    /// A request arrives, then both ends are cut.
    Cutting,
    /// A request is held back, and arrives when its client has given up.
    Late,
    /// ClickHouse has hardly any memory for a request, and says so.
    Tight,
    /// ClickHouse takes requests that only read.
    ReadOnly,
}

const MOODS: [Mood; 6] = [Mood::Fair, Mood::Mute, Mood::Cutting, Mood::Late, Mood::Tight, Mood::ReadOnly];

impl Mood {
    /// The setting that a request to ClickHouse gets on its way.
    const fn setting(self) -> Option<&'static str> {
        match self {
            Self::Tight => Some("max_memory_usage=20000&"),
            Self::ReadOnly => Some("readonly=1&"),
            Self::Fair | Self::Mute | Self::Cutting | Self::Late => None,
        }
    }
}

/// What was read of a request, with the setting in its address if this is its beginning.
fn with_setting(read: &[u8], mood: Mood) -> Vec<u8> {
    const BEGINNING: &[u8] = b"POST /?";
    match (mood.setting(), read.strip_prefix(BEGINNING)) {
        (Some(setting), Some(rest)) => [BEGINNING, setting.as_bytes(), rest].concat(),
        _ => read.to_vec(),
    }
}

/// How long a late request is held back after its last byte: longer than clients here wait for an answer.
const LATENESS: Duration = Duration::from_secs(3);

/// The proxy; it ends when dropped.
pub struct Proxy {
    pub address: SocketAddr,
    state: Arc<State>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    mood: AtomicUsize,
    late: AtomicUsize,
}

impl State {
    fn mood(&self) -> Mood {
        MOODS[self.mood.load(Ordering::Relaxed)]
    }
}

impl Proxy {
    /// Listens on a port of its own for what is meant for `target`, `host:port`.
    pub async fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (state, target) = (Arc::<State>::default(), target.to_owned());
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(carry(client, target.clone(), Arc::clone(&shared)));
            }
        });
        Self { address, state, task }
    }

    pub fn set(&self, mood: Mood) {
        self.state.mood.store(MOODS.iter().position(|known| *known == mood).unwrap(), Ordering::Relaxed);
    }

    /// How many requests have been delivered late, and answered.
    pub fn late(&self) -> usize {
        self.state.late.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One connection, until either side closes it.
async fn carry(mut client: TcpStream, target: String, state: Arc<State>) {
    let Ok(mut server) = TcpStream::connect(&target).await else { return };
    let (mut request, mut answer) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        tokio::select! {
            read = client.read(&mut request) => {
                let Ok(count @ 1..) = read else { return };
                if state.mood() == Mood::Late {
                    return deliver_late(client, server, request[..count].to_vec(), &state).await;
                }
                if server.write_all(&with_setting(&request[..count], state.mood())).await.is_err() {
                    return;
                }
            }
            read = server.read(&mut answer) => {
                let Ok(count @ 1..) = read else { return };
                match state.mood() {
                    Mood::Mute => {}
                    Mood::Cutting => return,
                    Mood::Fair | Mood::Late | Mood::Tight | Mood::ReadOnly => {
                        if client.write_all(&answer[..count]).await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
    }
}

/// Takes all that the client says; much later the server gets it.
async fn deliver_late(mut client: TcpStream, mut server: TcpStream, mut held: Vec<u8>, state: &State) {
    let mut chunk = vec![0; 64 * 1024];
    while let Ok(Ok(count @ 1..)) = timeout(LATENESS, client.read(&mut chunk)).await {
        held.extend_from_slice(&chunk[..count]);
    }
    if server.write_all(&held).await.is_ok() {
        // The answer: what was asked for is done.
        let _ = timeout(Duration::from_secs(10), server.read(&mut chunk)).await;
        state.late.fetch_add(1, Ordering::Relaxed);
    }
}

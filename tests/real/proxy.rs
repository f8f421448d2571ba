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
    time::sleep,
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
    /// A request is held back, and arrives a while after the client has given up.
    Late,
}

const MOODS: [Mood; 4] = [Mood::Fair, Mood::Mute, Mood::Cutting, Mood::Late];

/// How long a late request waits after its client has gone.
const LATENESS: Duration = Duration::from_millis(1_500);

/// The proxy; it ends when dropped.
pub struct Proxy {
    pub address: SocketAddr,
    mood: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a port of its own for what is meant for `target`, `host:port`.
    pub async fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mood, target) = (Arc::new(AtomicUsize::new(0)), target.to_owned());
        let moods = Arc::clone(&mood);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(carry(client, target.clone(), Arc::clone(&moods)));
            }
        });
        Self { address, mood, task }
    }

    pub fn set(&self, mood: Mood) {
        self.mood.store(MOODS.iter().position(|known| *known == mood).unwrap(), Ordering::Relaxed);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One connection, until either side closes it.
async fn carry(mut client: TcpStream, target: String, moods: Arc<AtomicUsize>) {
    let Ok(mut server) = TcpStream::connect(&target).await else { return };
    let (mut request, mut answer) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        let mood = || MOODS[moods.load(Ordering::Relaxed)];
        tokio::select! {
            read = client.read(&mut request) => {
                let Ok(count @ 1..) = read else { return };
                if mood() == Mood::Late {
                    return deliver_late(client, server, request[..count].to_vec()).await;
                }
                if server.write_all(&request[..count]).await.is_err() {
                    return;
                }
            }
            read = server.read(&mut answer) => {
                let Ok(count @ 1..) = read else { return };
                match mood() {
                    Mood::Mute => {}
                    Mood::Cutting => return,
                    Mood::Fair | Mood::Late => {
                        if client.write_all(&answer[..count]).await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
    }
}

/// Takes all that the client says until it gives up; then the server gets it.
async fn deliver_late(mut client: TcpStream, mut server: TcpStream, mut held: Vec<u8>) {
    let _ = client.read_to_end(&mut held).await;
    sleep(LATENESS).await;
    if server.write_all(&held).await.is_ok() {
        // To the end of the answer: what was asked for is done.
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(10), server.read_to_end(&mut answer)).await;
    }
}

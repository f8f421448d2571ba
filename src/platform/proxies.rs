//! For tests: a small HTTP proxy (CONNECT and forwarding) and a small SOCKS5 proxy on the loopback, each of which
//! calls the vendor from an address of its own.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
};

/// What a proxy does with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Works,
    /// 407, or SOCKS's refusal of the credentials.
    Denies,
    /// The vendor's firewall behind it: 403 for everybody (HTTP only).
    Forbids,
    /// The same, as it says so with HTTP 200 (HTTP only).
    Notice,
}

/// A running proxy, gone when it is dropped.
pub(crate) struct Proxy {
    pub url: String,
    mood: Arc<Mutex<Mood>>,
    connections: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

#[derive(Clone)]
struct Session {
    from: Ipv4Addr,
    credentials: Option<&'static str>,
    mood: Mood,
}

impl Proxy {
    pub async fn http(from: [u8; 4], credentials: Option<&'static str>) -> Self {
        Self::listen("http", SocketAddr::from(([127, 0, 0, 1], 0)), from, credentials).await
    }

    pub async fn socks(from: [u8; 4], credentials: Option<&'static str>) -> Self {
        Self::listen("socks5", SocketAddr::from(([127, 0, 0, 1], 0)), from, credentials).await
    }

    pub async fn listen(
        scheme: &'static str,
        at: SocketAddr,
        from: [u8; 4],
        credentials: Option<&'static str>,
    ) -> Self {
        let listener = TcpListener::bind(at).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mood, connections) = (Arc::new(Mutex::new(Mood::Works)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = JoinSet::new();
        let (moods, count) = (Arc::clone(&mood), Arc::clone(&connections));
        tasks.spawn(async move {
            let mut sessions = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                count.fetch_add(1, SeqCst);
                let session = Session { from: from.into(), credentials, mood: *moods.lock().unwrap() };
                sessions.spawn(async move {
                    let ended = if scheme == "http" { session.http(client).await } else { session.socks(client).await };
                    // Whatever is wrong with a connection is what the test is about.
                    drop(ended);
                });
            }
        });
        Self { url: format!("{scheme}://{address}"), mood, connections, _tasks: tasks }
    }

    pub fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    pub fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }
}

impl Session {
    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.set_nodelay(true)?;
        socket.bind((IpAddr::from(self.from), 0).into())?;
        socket.connect(to).await
    }

    async fn http(self, mut client: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let mut head = Vec::new();
        while !head.windows(4).any(|end| end == b"\r\n\r\n") {
            let mut buffer = [0; 4096];
            let count = client.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            head.extend_from_slice(&buffer[..count]);
        }
        let text = String::from_utf8_lossy(&head).into_owned();
        let wanted = self.credentials.map(|credentials| format!("Basic {}", STANDARD.encode(credentials)));
        if self.mood == Mood::Denies || wanted.is_some_and(|wanted| !text.contains(&wanted)) {
            let reply = "HTTP/1.1 407 Proxy Authentication Required\r\nproxy-authenticate: Basic\r\n\
                         connection: close\r\ncontent-length: 0\r\n\r\n";
            return client.write_all(reply.as_bytes()).await;
        }
        if self.mood == Mood::Notice {
            let body = r#"{"rgv587_flag":"sm","url":"https://h5api.m.taobao.com/_____tmd_____/punish"}"#;
            let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
            return client.write_all(format!("{head}{body}").as_bytes()).await;
        }
        if self.mood == Mood::Forbids {
            let reply = "HTTP/1.1 403 Forbidden\r\nconnection: close\r\ncontent-length: 6\r\n\r\nbanned";
            return client.write_all(reply.as_bytes()).await;
        }
        let mut words = text.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let host = target.trim_start_matches("http://").split('/').next().unwrap_or_default();
        let host = host.parse().map_err(io::Error::other)?;
        let Ok(mut vendor) = self.connect(host).await else {
            return client.write_all(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n").await;
        };
        if method == "CONNECT" {
            client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
        } else {
            // A server takes a request with its whole URL as well.
            vendor.write_all(&head).await?;
        }
        copy_bidirectional(&mut client, &mut vendor).await.map(|_| ())
    }

    /// RFC 1928 and 1929, IPv4 only.
    async fn socks(self, mut client: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let mut start = [0; 2];
        client.read_exact(&mut start).await?;
        let mut methods = vec![0; start[1].into()];
        client.read_exact(&mut methods).await?;
        let method = if self.credentials.is_some() { 2 } else { 0 };
        client.write_all(&[5, method]).await?;
        if let Some(credentials) = self.credentials {
            let mut texts = [String::new(), String::new()];
            client.read_u8().await?;
            for text in &mut texts {
                let mut bytes = vec![0; client.read_u8().await?.into()];
                client.read_exact(&mut bytes).await?;
                *text = String::from_utf8(bytes).map_err(io::Error::other)?;
            }
            let is_right = self.mood == Mood::Works && texts.join(":") == credentials;
            client.write_all(&[1, u8::from(!is_right)]).await?;
            if !is_right {
                return Ok(());
            }
        }
        let mut request = [0; 10];
        client.read_exact(&mut request).await?;
        let port = u16::from_be_bytes([request[8], request[9]]);
        let to = SocketAddr::from(([request[4], request[5], request[6], request[7]], port));
        match self.connect(to).await {
            Ok(mut vendor) => {
                client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await?;
                copy_bidirectional(&mut client, &mut vendor).await.map(|_| ())
            }
            Err(_) => client.write_all(&[5, 5, 0, 1, 0, 0, 0, 0, 0, 0]).await,
        }
    }
}

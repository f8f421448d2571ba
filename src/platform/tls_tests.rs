//! TLS with a vendor whose certificate an authority of the test's own has signed.

use std::{convert::Infallible, path::Path, pin::Pin};

use axum::{
    body::Body,
    http::{Request, Response},
};
use figment::providers::{Format, Toml};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use openssl::{
    asn1::Asn1Time,
    bn::BigNum,
    ec::{EcGroup, EcKey},
    hash::MessageDigest,
    nid::Nid,
    pkey::{PKey, Private},
    ssl::{AlpnError, Ssl, SslAcceptor, SslMethod, select_next_proto},
    x509::{
        X509, X509Name,
        extension::{BasicConstraints, SubjectAlternativeName},
    },
};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_openssl::SslStream;

use super::*;
use crate::platform::{Source, SourceConfig};

type Key = PKey<Private>;

fn key() -> Key {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
}

/// A certificate for a day, signed by an authority, or by itself.
fn certificate(name: &str, key: &Key, by: Option<(&X509, &Key)>) -> X509 {
    let mut subject = X509Name::builder().unwrap();
    subject.append_entry_by_nid(Nid::COMMONNAME, name).unwrap();
    let subject = subject.build();
    let mut builder = X509::builder().unwrap();
    builder.set_version(2).unwrap();
    let serial = BigNum::from_u32(if by.is_some() { 2 } else { 1 }).unwrap().to_asn1_integer().unwrap();
    builder.set_serial_number(&serial).unwrap();
    builder.set_subject_name(&subject).unwrap();
    builder.set_issuer_name(by.map_or(&*subject, |(authority, _)| authority.subject_name())).unwrap();
    builder.set_pubkey(key).unwrap();
    builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
    if by.is_none() {
        builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
    }
    let names = SubjectAlternativeName::new().ip("127.0.0.1").build(&builder.x509v3_context(None, None)).unwrap();
    builder.append_extension(names).unwrap();
    builder.sign(by.map_or(key, |(_, key)| key), MessageDigest::sha256()).unwrap();
    builder.build()
}

/// A vendor that says which HTTP it was spoken to, and the PEM of who vouches for it. `offers`: as TLS has it, each with
/// its length before it.
async fn vendor(offers: &'static [u8], tasks: &mut JoinSet<()>) -> (String, Vec<u8>) {
    vendor_that(serve, offers, tasks).await
}

/// The same that does something else with each connection.
async fn vendor_that<F: Future<Output = ()> + Send + 'static>(
    serve: impl Fn(SslStream<tokio::net::TcpStream>) -> F + Send + 'static,
    offers: &'static [u8],
    tasks: &mut JoinSet<()>,
) -> (String, Vec<u8>) {
    let (authority_key, own_key) = (key(), key());
    let authority = certificate("weir test authority", &authority_key, None);
    let own = certificate("vendor", &own_key, Some((&authority, &authority_key)));
    let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server()).unwrap();
    acceptor.set_private_key(&own_key).unwrap();
    acceptor.set_certificate(&own).unwrap();
    acceptor.set_alpn_select_callback(|_, asked| select_next_proto(offers, asked).ok_or(AlpnError::NOACK));
    let acceptor = acceptor.build();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    tasks.spawn(async move {
        let mut served = JoinSet::new();
        while let Ok((socket, _)) = listener.accept().await {
            let tls = SslStream::new(Ssl::new(acceptor.context()).unwrap(), socket).unwrap();
            served.spawn(serve(tls));
        }
    });
    (url, authority.to_pem().unwrap())
}

async fn serve(mut tls: SslStream<tokio::net::TcpStream>) {
    // Whoever does not trust us ends it here.
    if Pin::new(&mut tls).accept().await.is_err() {
        return;
    }
    let is_http2 = tls.ssl().selected_alpn_protocol() == Some(b"h2");
    let answer = service_fn(async |request: Request<Incoming>| {
        Ok::<_, Infallible>(Response::new(Body::from(format!("{:?}", request.version()))))
    });
    let (io, executor) = (TokioIo::new(tls), TokioExecutor::new());
    if is_http2 {
        let _ = hyper::server::conn::http2::Builder::new(executor).serve_connection(io, answer).await;
    } else {
        let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, answer).await;
    }
}

/// A source as it is configured.
fn source(url: &str, folder: &Path, more: &str) -> Result<Client, String> {
    let text = format!(
        "name = \"ali1688\"\nkind = \"ali1688\"\nurl = {url:?}\nunlimited = true\n{more}\n\
         account = [{{ alias = \"a\", app_key = \"1\", app_secret = {{ env = \"S\" }} }}]"
    );
    let config = <Toml as Format>::from_str::<SourceConfig>(&text).map_err(|error| error.to_string())?;
    let opened = Source::open(&config, folder, &|_| Some("secret".to_owned()));
    opened.map(|source| source.client).map_err(|error| error.to_string())
}

async fn call(client: &Client, url: &str) -> Result<HttpReply, Refusal> {
    client.exchange(&Exchange::post(format!("{url}/item"), vec![("token".to_owned(), "hunter22".to_owned())])).await
}

/// What an HTTP/2 peer says to the first call of a connection; then it closes it, if it does.
#[derive(Clone, Copy)]
struct Last {
    frame: &'static [u8],
    closes: bool,
}

impl Last {
    /// Reads up to the headers of a call and says it.
    async fn say(self, mut tls: SslStream<tokio::net::TcpStream>) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        const HEADERS: u8 = 1;
        let mut preface = [0; 24];
        if Pin::new(&mut tls).accept().await.is_err() || tls.read_exact(&mut preface).await.is_err() {
            return;
        }
        // Settings, none of them.
        tls.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        let mut head = [0; 9];
        while tls.read_exact(&mut head).await.is_ok() {
            let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            tls.read_exact(&mut payload).await.unwrap();
            if head[3] == HEADERS {
                tls.write_all(self.frame).await.unwrap();
                if self.closes {
                    return;
                }
            }
        }
    }
}

#[tokio::test]
async fn what_a_peer_says_it_has_not_acted_on_is_no_outage() {
    // A reset of stream 1, and GOAWAY with the last stream that was processed and why.
    let refused: &[u8] = &[0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 7];
    let failed: &[u8] = &[0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 2];
    let before_all: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let too_much: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11];
    let after_it: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
    let table = [
        ("REFUSED_STREAM", Last { frame: refused, closes: false }, true),
        ("GOAWAY before the call", Last { frame: before_all, closes: false }, true),
        ("and closed", Last { frame: before_all, closes: true }, true),
        ("ENHANCE_YOUR_CALM", Last { frame: too_much, closes: true }, true),
        ("INTERNAL_ERROR", Last { frame: failed, closes: false }, false),
        ("GOAWAY after the call, and closed", Last { frame: after_it, closes: true }, false),
        ("closed", Last { frame: &[], closes: true }, false),
    ];
    let (mut tasks, folder) = (JoinSet::new(), tempfile::tempdir().unwrap());
    for (what, last, is_unprocessed) in table {
        let (url, pem) = vendor_that(move |tls| last.say(tls), b"\x02h2", &mut tasks).await;
        std::fs::write(folder.path().join("ca.pem"), pem).unwrap();
        let client = source(&url, folder.path(), "ca_file = \"ca.pem\"").unwrap();
        let outcome = client.exchange_from(0, &Exchange::post(format!("{url}/item"), vec![])).await;
        match outcome {
            Err(NoReply::Unprocessed(Unprocessed { refusal, is_certain })) => {
                assert!(is_unprocessed && is_certain && refusal.code == "closed", "{what}: {refusal:?}");
            }
            Err(NoReply::Refused(refusal)) => {
                assert!(!is_unprocessed && refusal.kind == RefusalKind::Outage, "{what}: {refusal:?}");
            }
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn http_2_is_spoken_where_it_is_offered_and_http_1_where_not() {
    let (mut tasks, folder) = (JoinSet::new(), tempfile::tempdir().unwrap());
    for (offers, spoken) in [(&b"\x02h2\x08http/1.1"[..], "HTTP/2.0"), (b"\x08http/1.1", "HTTP/1.1")] {
        let (url, pem) = vendor(offers, &mut tasks).await;
        std::fs::write(folder.path().join("ca.pem"), pem).unwrap();
        let client = source(&url, folder.path(), "ca_file = \"ca.pem\"").unwrap();
        for _ in 0..2 {
            assert_eq!(call(&client, &url).await.unwrap().body, spoken);
        }
    }
}

#[tokio::test]
async fn who_is_vouched_for_by_nobody_that_is_trusted_is_refused_and_the_error_says_so() {
    let (mut tasks, folder) = (JoinSet::new(), tempfile::tempdir().unwrap());
    let (url, _) = vendor(b"\x02h2", &mut tasks).await;
    let (_, other) = vendor(b"\x02h2", &mut tasks).await;
    std::fs::write(folder.path().join("other.pem"), other).unwrap();
    for more in ["", "ca_file = \"other.pem\""] {
        let client = source(&url, folder.path(), more).unwrap();
        let Refusal { kind, code, message } = call(&client, &url).await.unwrap_err();
        assert_eq!((kind, code.as_str()), (RefusalKind::Outage, "tls"), "{more}: {message}");
        assert!(message.contains("certificate is not trusted") && message.contains("ca_file"), "{message}");
        assert!(!message.contains("hunter22"), "{message}");
    }
}

#[test]
fn a_file_of_authorities_that_is_none_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("empty.pem"), "").unwrap();
    std::fs::write(folder.path().join("torn.pem"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .unwrap();
    for name in ["missing.pem", "empty.pem", "torn.pem"] {
        let error = source("https://127.0.0.1:9", folder.path(), &format!("ca_file = {name:?}")).unwrap_err();
        assert!(error.contains("ca_file is ") && error.contains(name) && error.contains("PEM"), "{error}");
    }
}

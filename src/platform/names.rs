//! The addresses that the vendors' names stand for, kept for a while: not every new connection waits for a name server.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::io::Errno;
use tokio::time::Instant;

/// More names than any configuration has.
const NAMES_LIMIT: usize = 1_024;

/// Names that were looked up.
#[derive(Debug)]
pub(super) struct Names {
    kept_for: Duration,
    known: Mutex<HashMap<String, Known>>,
}

#[derive(Clone, Debug)]
struct Known {
    addresses: Vec<SocketAddr>,
    until: Instant,
}

impl Names {
    /// Nothing is known yet; what is looked up counts for `kept_for`.
    pub(super) fn new(kept_for: Duration) -> Self {
        Self { kept_for, known: Mutex::default() }
    }

    /// The addresses of a name: as known, else by `look_up`. If that fails, as known before.
    ///
    /// # Errors
    /// That of `look_up`, if the name was never known.
    pub(super) async fn resolve(
        &self,
        name: &str,
        look_up: impl Future<Output = io::Result<Vec<SocketAddr>>>,
    ) -> io::Result<Vec<SocketAddr>> {
        let known = self.lock().get(name).cloned();
        if let Some(known) = &known
            && Instant::now() < known.until
        {
            return Ok(known.addresses.clone());
        }
        match (look_up.await, known) {
            (Ok(addresses), _) if !addresses.is_empty() => {
                self.learn(name, addresses.clone());
                Ok(addresses)
            }
            // A name server that is away for a minute is no reason to stop calling.
            (_, Some(known)) => Ok(known.addresses),
            (outcome, None) => outcome,
        }
    }

    /// Nobody could connect to what is known of this name: the vendor may have moved.
    pub(super) fn doubt(&self, name: &str) {
        if let Some(known) = self.lock().get_mut(name) {
            known.until = Instant::now();
        }
    }

    fn learn(&self, name: &str, addresses: Vec<SocketAddr>) {
        let mut all = self.lock();
        if all.len() >= NAMES_LIMIT {
            all.clear();
        }
        all.insert(name.to_owned(), Known { addresses, until: Instant::now() + self.kept_for });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// These addresses without those that this machine has no way to, unless there are no others. Of a vendor that is away the
/// last error counts, and for an address of the other family it would be that this machine has none to call from.
pub(super) fn usable(found: Vec<SocketAddr>, has_way: impl Fn(SocketAddr) -> bool) -> Vec<SocketAddr> {
    let usable: Vec<SocketAddr> = found.iter().copied().filter(|address| has_way(*address)).collect();
    if usable.is_empty() { found } else { usable }
}

/// Whether this machine has an address to call this one from, and a route. Nothing is sent; where it cannot be told,
/// because a descriptor is missing for it, the call finds out.
pub(super) fn has_way(address: SocketAddr) -> bool {
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // A datagram's socket needs a port to look up the route.
    let port = if address.port() == 0 { 9 } else { address.port() };
    let looked_up = UdpSocket::bind((any, 0)).and_then(|socket| socket.connect((address.ip(), port)));
    let Err(error) = looked_up else { return true };
    !matches!(
        Errno::from_io_error(&error),
        Some(Errno::ADDRNOTAVAIL | Errno::NETUNREACH | Errno::AFNOSUPPORT | Errno::INVAL)
    )
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddrV6;

    use super::*;

    #[test]
    fn addresses_that_this_machine_has_no_way_to_are_left_out_unless_there_are_no_others() {
        let (four, six): (SocketAddr, SocketAddr) =
            ("192.0.2.1:0".parse().unwrap(), "[2001:db8::1]:0".parse().unwrap());
        assert_eq!(usable(vec![four, six], |address| address.is_ipv4()), [four]);
        assert_eq!(usable(vec![six, four], |address| address.is_ipv6()), [six]);
        assert_eq!(usable(vec![four, six], |_| true), [four, six]);
        assert_eq!(usable(vec![four, six], |_| false), [four, six], "the error says why");
        assert!(has_way("127.0.0.1:0".parse().unwrap()) && has_way("127.0.0.1:443".parse().unwrap()));
        // An interface that does not exist, as where the family is not in use.
        assert!(!has_way(SocketAddrV6::new("fe80::1".parse().unwrap(), 0, 0, 0).into()));
    }

    const MINUTE: Duration = Duration::from_secs(60);

    fn address(last: u8) -> Vec<SocketAddr> {
        vec![SocketAddr::from(([192, 0, 2, last], 0))]
    }

    /// What a lookup finds that would bring this; and whether it was needed.
    async fn look(names: &Names, answer: io::Result<Vec<SocketAddr>>) -> (io::Result<Vec<SocketAddr>>, bool) {
        let mut was_needed = false;
        let found = names.resolve("gw.example", async { (was_needed = true, answer).1 }).await;
        (found, was_needed)
    }

    fn away() -> io::Result<Vec<SocketAddr>> {
        Err(io::ErrorKind::TimedOut.into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_looked_up_once_in_its_time() {
        let names = Names::new(5 * MINUTE);
        assert!(look(&names, Ok(address(1))).await.1);
        tokio::time::advance(4 * MINUTE).await;
        let (found, was_needed) = look(&names, Ok(address(2))).await;
        assert_eq!((found.unwrap(), was_needed), (address(1), false));
        tokio::time::advance(MINUTE).await;
        let (found, was_needed) = look(&names, Ok(address(2))).await;
        assert_eq!((found.unwrap(), was_needed), (address(2), true));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_known_serves_while_the_name_server_is_away() {
        let names = Names::new(MINUTE);
        assert!(look(&names, away()).await.0.is_err());
        look(&names, Ok(address(1))).await.0.unwrap();
        tokio::time::advance(2 * MINUTE).await;
        for answer in [away(), Ok(Vec::new())] {
            let (found, was_needed) = look(&names, answer).await;
            assert_eq!((found.unwrap(), was_needed), (address(1), true));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_vendor_that_cannot_be_reached_is_looked_up_anew() {
        let names = Names::new(5 * MINUTE);
        look(&names, Ok(address(1))).await.0.unwrap();
        names.doubt("gw.example");
        let (found, was_needed) = look(&names, Ok(address(2))).await;
        assert_eq!((found.unwrap(), was_needed), (address(2), true));
    }
}

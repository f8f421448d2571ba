//! The addresses that the vendors' names stand for, kept for a while: not every new connection waits for a name server.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

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

#[cfg(test)]
mod tests {
    use super::*;

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

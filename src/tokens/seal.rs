//! Encrypts tokens for Redis: XChaCha20-Poly1305, bound to their account. Pure but for the nonce.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};
use hmac::{Hmac, Mac as _};
use sha1::Sha1;

/// The nonce's length: long enough to be random.
const NONCE: usize = 24;
/// How much of a key's fingerprint is kept beside what it sealed, in bytes.
const FINGERPRINT: usize = 4;
/// The form of what is sealed, in its first byte.
const FORM: u8 = 1;

/// A key that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be 32 bytes in base64 or in hex, as `openssl rand -base64 32` makes them")]
pub struct InvalidKey;

/// Why something cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unopened {
    /// It was sealed with another key.
    OtherKey,
    /// It was changed, or belongs to another account.
    Damaged,
}

/// Seals and opens with one key, which it does not show.
pub struct Sealer {
    cipher: XChaCha20Poly1305,
    fingerprint: [u8; FINGERPRINT],
}

impl Sealer {
    /// With a key of 32 bytes in base64 or hex.
    ///
    /// # Errors
    /// [`InvalidKey`], which does not repeat it.
    pub fn new(key: &str) -> Result<Self, InvalidKey> {
        let key = key.trim();
        let bytes = if key.len() == 64 { hex::decode(key).ok() } else { BASE64_STANDARD.decode(key).ok() };
        let bytes: [u8; 32] = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or(InvalidKey)?;
        let mac = <Hmac<Sha1> as hmac::KeyInit>::new_from_slice(&bytes).map_err(|_| InvalidKey)?;
        let digest = mac.chain_update(b"weir tokens").finalize().into_bytes();
        let mut fingerprint = [0; FINGERPRINT];
        fingerprint.copy_from_slice(&digest[..FINGERPRINT]);
        Ok(Self { cipher: XChaCha20Poly1305::new(&bytes.into()), fingerprint })
    }

    /// Seals a text for `owner`, as text.
    pub(super) fn seal(&self, owner: &str, text: &str) -> Result<String, Unopened> {
        let nonce: [u8; NONCE] = rand::random();
        let payload = Payload { msg: text.as_bytes(), aad: owner.as_bytes() };
        let sealed = self.cipher.encrypt(&XNonce::from(nonce), payload).map_err(|_| Unopened::Damaged)?;
        let bytes = [&[FORM][..], &self.fingerprint, &nonce, &sealed].concat();
        Ok(BASE64_STANDARD.encode(bytes))
    }

    /// Opens what was sealed for the same owner with the same key.
    pub(super) fn open(&self, owner: &str, sealed: &str) -> Result<String, Unopened> {
        let bytes = BASE64_STANDARD.decode(sealed).map_err(|_| Unopened::Damaged)?;
        let (form, rest) = bytes.split_first().ok_or(Unopened::Damaged)?;
        let (fingerprint, rest) = rest.split_at_checked(FINGERPRINT).ok_or(Unopened::Damaged)?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE>().ok_or(Unopened::Damaged)?;
        if *form != FORM {
            return Err(Unopened::Damaged);
        }
        if fingerprint != self.fingerprint {
            return Err(Unopened::OtherKey);
        }
        let payload = Payload { msg: sealed, aad: owner.as_bytes() };
        let text = self.cipher.decrypt(&XNonce::from(*nonce), payload).map_err(|_| Unopened::Damaged)?;
        String::from_utf8(text).map_err(|_| Unopened::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealer(byte: u8) -> Sealer {
        Sealer::new(&BASE64_STANDARD.encode([byte; 32])).unwrap()
    }

    #[test]
    fn what_is_sealed_is_opened_by_the_same_key_for_the_same_owner_alone() {
        let sealed = sealer(1).seal("ali1688/one", "at-0001").unwrap();
        assert!(!sealed.contains("at-0001") && !sealed.contains(&BASE64_STANDARD.encode("at-0001")));
        assert_eq!(sealer(1).open("ali1688/one", &sealed).as_deref(), Ok("at-0001"));
        assert_eq!(sealer(1).open("ali1688/two", &sealed), Err(Unopened::Damaged));
        assert_eq!(sealer(2).open("ali1688/one", &sealed), Err(Unopened::OtherKey));
        assert_ne!(sealer(1).seal("ali1688/one", "at-0001").unwrap(), sealed, "a nonce is used once");
    }

    #[test]
    fn whatever_is_changed_is_noticed() {
        let sealed = BASE64_STANDARD.decode(sealer(1).seal("a", "at-0001").unwrap()).unwrap();
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(sealer(1).open("a", &BASE64_STANDARD.encode(changed)).is_err(), "byte {at}");
            assert!(sealer(1).open("a", &BASE64_STANDARD.encode(&sealed[..at])).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_key_has_32_bytes_in_base64_or_hex() {
        assert!(Sealer::new(&hex::encode([7; 32])).is_ok());
        assert!(Sealer::new(&format!(" {}\n", BASE64_STANDARD.encode([7; 32]))).is_ok());
        for key in ["", "hunter2", &hex::encode([7; 31]), &BASE64_STANDARD.encode([7; 33])] {
            assert_eq!(Sealer::new(key).err(), Some(InvalidKey), "{key}");
        }
    }
}

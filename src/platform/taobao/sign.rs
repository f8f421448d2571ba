//! TOP's signatures: over the sorted parameters, without any path.
//!
//! <https://developer.alibaba.com/docs/doc.htm?articleId=101617>, and the vectors in the tests below.

use hmac::{Hmac, KeyInit, Mac};
use md5::{Digest as _, Md5};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

/// The parameter that carries the signature, and the only one with a value that is not signed.
pub const SIGNATURE: &str = "sign";

/// How a call is signed; `sign_method` of a call says which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SignMethod {
    /// MD5 over secret, parameters and secret.
    #[serde(rename = "md5")]
    Md5,
    /// HMAC-MD5.
    #[serde(rename = "hmac")]
    Hmac,
    /// HMAC-SHA256.
    #[default]
    #[serde(rename = "hmac-sha256")]
    HmacSha256,
}

impl SignMethod {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Md5, Self::Hmac, Self::HmacSha256];

    /// What the protocol calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Hmac => "hmac",
            Self::HmacSha256 => "hmac-sha256",
        }
    }
}

/// `sign` for these parameters: upper-case hex.
///
/// Parameters are joined as raw UTF-8 `key + value`, sorted by *key*. `sign` itself, and whatever has an empty key or
/// value, is left out. The secret stands around the text for [`SignMethod::Md5`] alone.
#[must_use]
pub fn signature<K: AsRef<str>, V: AsRef<str>>(method: SignMethod, params: &[(K, V)], secret: &str) -> String {
    let text = joined(params);
    let secret = secret.as_bytes();
    match method {
        SignMethod::Md5 => {
            let digest = Md5::new().chain_update(secret).chain_update(&text).chain_update(secret).finalize();
            hex::encode_upper(digest)
        }
        SignMethod::Hmac => hex::encode_upper(hmac::<Hmac<Md5>>(secret, &text)),
        SignMethod::HmacSha256 => hex::encode_upper(hmac::<Hmac<Sha256>>(secret, &text)),
    }
}

/// Whether `given` is the signature: upper-case hex, compared in a time that does not depend on where they differ.
#[must_use]
pub fn verify<K: AsRef<str>, V: AsRef<str>>(method: SignMethod, params: &[(K, V)], secret: &str, given: &str) -> bool {
    let right = signature(method, params, secret);
    right.len() == given.len() && right.bytes().zip(given.bytes()).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

fn joined<K: AsRef<str>, V: AsRef<str>>(params: &[(K, V)]) -> String {
    let signed = params.iter().map(|(key, value)| (key.as_ref(), value.as_ref()));
    let mut signed: Vec<(&str, &str)> =
        signed.filter(|(key, value)| *key != SIGNATURE && !key.is_empty() && !value.is_empty()).collect();
    signed.sort_unstable();
    signed.into_iter().flat_map(|(key, value)| [key, value]).collect()
}

fn hmac<M: Mac + KeyInit>(secret: &[u8], text: &str) -> Vec<u8> {
    // HMAC takes a key of any length, so there is always one.
    let Ok(mut mac) = <M as KeyInit>::new_from_slice(secret) else { return Vec::new() };
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parameters of the platform's own example, without `sign_method`.
    const BASE: [(&str, &str); 8] = [
        ("method", "taobao.item.seller.get"),
        ("app_key", "12345678"),
        ("session", "test"),
        ("timestamp", "2016-01-01 12:00:00"),
        ("format", "json"),
        ("v", "2.0"),
        ("fields", "num_iid,title,nick,price,num"),
        ("num_iid", "11223344"),
    ];
    const ORDER: [(&str, &str); 4] = [("foo", "1"), ("bar", "2"), ("foo_bar", "3"), ("foobar", "4")];
    const BATCH: [(&str, &str); 8] = [
        ("method", "taobao.items.seller.list.get"),
        ("app_key", "12345678"),
        ("session", "test"),
        ("timestamp", "2016-01-01 12:00:00"),
        ("format", "json"),
        ("v", "2.0"),
        ("fields", "num_iid,title,nick,price,cid,sku"),
        ("num_iids", "11223344,55667788"),
    ];

    #[track_caller]
    fn assert_signed(name: &str, method: SignMethod, params: &[(&str, &str)], secret: &str, expected: &str) {
        let reversed: Vec<_> = params.iter().rev().copied().collect();
        assert_eq!(signature(method, params, secret), expected, "{name}");
        assert_eq!(signature(method, &reversed, secret), expected, "{name}, reversed");
        assert!(verify(method, params, secret, expected), "{name}");
        assert!(!verify(method, params, secret, &expected.to_lowercase()), "{name}, in lower case");
        assert!(!verify(method, params, "another", expected), "{name}, with another secret");
    }

    fn base(more: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
        BASE.iter().chain(more).copied().collect()
    }

    /// `T1` is the platform's own example; the others were computed apart from this code.
    #[test]
    fn t1_to_t3_the_three_methods_sign_the_platforms_example() {
        let table = [
            ("T1", SignMethod::Md5, "66987CB115214E59E6EC978214934FB8"),
            ("T2", SignMethod::Hmac, "D56D7858309C31B6251083A874D48273"),
            ("T3", SignMethod::HmacSha256, "04DB15AD0774D5CFCE2C837DE43E3FCEA9011ED74F3038FB6AB5F3C4CEA119E8"),
        ];
        for (name, method, expected) in table {
            assert_signed(name, method, &base(&[("sign_method", method.name())]), "helloworld", expected);
        }
    }

    #[test]
    fn t4_and_t5_an_hmac_has_no_secret_in_its_text() {
        let t4 = "3A9F9E53162A24430830CCA87B7FB623401B81EB6616A6EA75B3614AEBDC7F4D";
        assert_signed("T4", SignMethod::HmacSha256, &[("b", "2"), ("a", "1")], "secret", t4);
        // RFC 2202 and RFC 4231, their first cases.
        let (md5_key, sha_key) = ("\u{b}".repeat(16), "\u{b}".repeat(20));
        let hi = [("Hi", " There")];
        assert_signed("T5, MD5", SignMethod::Hmac, &hi, &md5_key, "9294727A3638BB1C13F48EF8158BFC9D");
        let t5 = "B0344C61D8DB38535CA8AFCEAF0BF12B881DC200C9833DA726E9376C2E32CFF7";
        assert_signed("T5, SHA-256", SignMethod::HmacSha256, &hi, &sha_key, t5);
    }

    #[test]
    fn t6_parameters_are_sorted_by_key() {
        let table = [
            (SignMethod::Md5, "5AAF1C690262A24768F5478B084C2C8A"),
            (SignMethod::Hmac, "E687005F819D6F9E6ED085311C8ACC75"),
            (SignMethod::HmacSha256, "339676BF36C50A8BD3D8F6B4A81B2F9AA614B05BFCFEBEFC169CB830D6B77D3B"),
        ];
        for (method, expected) in table {
            assert_signed("T6", method, &ORDER, "helloworld", expected);
        }
    }

    #[test]
    fn t7_what_is_empty_and_the_signature_itself_are_not_signed() {
        let expected = "0751C7E067DB2CF2C318E69FF82C541F0C2C29B5BBBA182812BB2D705CB27277";
        let mut params: Vec<_> = BATCH.into_iter().chain([("sign_method", "hmac-sha256")]).collect();
        assert_signed("T7", SignMethod::HmacSha256, &params, "helloworld", expected);
        params.extend([("empty", ""), ("", "nameless"), (SIGNATURE, "whatever")]);
        assert_signed("T7 with more", SignMethod::HmacSha256, &params, "helloworld", expected);
    }

    #[test]
    fn t8_values_are_raw_utf_8() {
        let params = base(&[("sign_method", "md5"), ("q", "女装")]);
        assert_signed("T8", SignMethod::Md5, &params, "helloworld", "6BAD7429C9DBA785D35B74DA525270F1");
    }
}

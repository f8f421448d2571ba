//! AOP's signature: HMAC-SHA1 over the path and the sorted parameters.
//!
//! <https://open.1688.com/api/sysSignature.htm?ns=cn.alibaba.open>, and the vectors in the tests below.

use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;

/// The parameter that carries the signature, and the only one that is not signed.
pub const SIGNATURE: &str = "_aop_signature";

/// `_aop_signature` for `path` (from `param2/…` on, or empty for authorise links) and parameters.
///
/// Parameters are joined as raw UTF-8 `key + value`, the *joined* texts sorted by bytes; `_aop_signature`
/// itself is left out. Upper-case hex.
#[must_use]
pub fn signature<K: AsRef<str>, V: AsRef<str>>(path: &str, params: &[(K, V)], secret: &str) -> String {
    hex::encode_upper(mac(path, params, secret).finalize().into_bytes())
}

/// Whether `given` is the signature, compared in constant time.
///
/// Only the upper-case hex that the gateway documents counts: the Base64 form of several articles is refused.
#[must_use]
pub fn verify<K: AsRef<str>, V: AsRef<str>>(path: &str, params: &[(K, V)], secret: &str, given: &str) -> bool {
    if given.bytes().any(|byte| byte.is_ascii_lowercase()) {
        return false;
    }
    let mut bytes = [0; 20];
    hex::decode_to_slice(given, &mut bytes).is_ok() && mac(path, params, secret).verify_slice(&bytes).is_ok()
}

fn mac<K: AsRef<str>, V: AsRef<str>>(path: &str, params: &[(K, V)], secret: &str) -> Hmac<Sha1> {
    // HMAC takes a key of any length, so the error cannot occur; an empty key would only sign wrongly.
    let mut mac = Hmac::<Sha1>::new_from_slice(secret.as_bytes())
        .unwrap_or_else(|_| Hmac::new(&hmac::digest::Key::<Hmac<Sha1>>::default()));
    mac.update(path.as_bytes());
    for joined in sorted(params) {
        mac.update(joined.as_bytes());
    }
    mac
}

fn sorted<K: AsRef<str>, V: AsRef<str>>(params: &[(K, V)]) -> Vec<String> {
    let signed = params.iter().filter(|(key, _)| key.as_ref() != SIGNATURE);
    let mut joined: Vec<String> = signed.map(|(key, value)| [key.as_ref(), value.as_ref()].concat()).collect();
    joined.sort_unstable();
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRODUCT: &str = "param2/1/com.alibaba.product/alibaba.product.get/1000000";

    /// Name, path, parameters, secret, signature: `A1` is the platform's own example, `A2`–`A4` come from
    /// public clients, the others were computed apart from this code.
    type Vector = (&'static str, &'static str, &'static [(&'static str, &'static str)], &'static str, &'static str);

    const VECTORS: [Vector; 7] = [
        (
            "A1",
            "param2/1/system/currentTime/1000000",
            &[("b", "2"), ("a", "1")],
            "test123",
            "33E54F4F7B989E3E0E912D3FBD2F1A03CA7CCE88",
        ),
        (
            "A2",
            "param2/1/com.alibaba.product/alibaba.product.get/app-key",
            &[("access_token", "access-token"), ("productID", "123456789"), ("webSite", "1688")],
            "app-secret",
            "93A389629D6D0D08CC3A537195DFF8E36E1D8DFC",
        ),
        (
            "A3",
            "param2/1/com.alibaba.trade/alibaba.trade.getBuyerOrderList/5890829",
            &[("access_token", "token-123"), ("page", "1"), ("pageSize", "20")],
            "app-secret",
            "7B91F432F48774204045D86636AFD333B71E95FB",
        ),
        (
            "A4 (parameters alone, as in authorise links)",
            "",
            &[
                ("client_id", "10000"),
                ("site", "china"),
                ("redirect_uri", "http://gw.open.1688.com/auth/auth.htm?key=value&secret=abcd"),
                ("state", "test"),
            ],
            "abcd",
            "300E0E24C543CAAEACBDB4883520D6CF2165B3AB",
        ),
        (
            "A5",
            PRODUCT,
            &[
                ("_aop_timestamp", "1700000000000"),
                ("access_token", "at-0001"),
                ("productID", "584051070147"),
                ("webSite", "1688"),
            ],
            "test123",
            "D1C523F97E03FD206938AB605F5D5BB338BDAB1B",
        ),
        (
            "A6 (sorted by joined text, not by key)",
            "param2/1/ns/api/1000000",
            &[("access_token", "at-0001"), ("page", "x"), ("pageSize", "20")],
            "test123",
            "DCF2626CF8CE4DD0ECB7F90BEB7263701E1CAAC9",
        ),
        (
            "A7 (raw UTF-8)",
            PRODUCT,
            &[("_aop_timestamp", "1700000000000"), ("access_token", "at-0001"), ("keyword", "玻璃杯 a+b")],
            "test123",
            "93D9C88E32FBA497E4ED73E56D63C91561FBCBD2",
        ),
    ];

    #[test]
    fn the_vectors_give_their_signatures_in_any_order_of_parameters() {
        for (name, path, params, secret, expected) in VECTORS {
            let reversed: Vec<_> = params.iter().rev().copied().collect();
            assert_eq!(signature(path, params, secret), expected, "{name}");
            assert_eq!(signature(path, &reversed, secret), expected, "{name}, reversed");
            assert!(verify(path, params, secret, expected), "{name}");
        }
    }

    #[test]
    fn the_signature_itself_is_not_signed() {
        let (_, path, _, secret, expected) = VECTORS[0];
        let params = [("b", "2"), (SIGNATURE, "whatever"), ("a", "1")];
        assert_eq!(signature(path, &params, secret), expected);
    }

    #[test]
    fn anything_but_upper_case_hex_of_the_right_bytes_is_refused() {
        let (_, path, params, secret, right) = VECTORS[0];
        let lower = right.to_lowercase();
        // A8: A1 in Base64.
        for wrong in ["M+VPT3uYnj4OkS0/vS8aA8p8zog=", &lower, &right[..38], "", &right.replace('3', "4")] {
            assert!(!verify(path, params, secret, wrong), "{wrong:?}");
        }
        assert!(!verify(path, params, "another", right));
        assert!(!verify("param2/1/system/currentTime/1000001", params, secret, right));
    }

    #[test]
    fn sorting_by_key_is_refused() {
        let (_, path, params, secret, _) = VECTORS[5];
        assert!(!verify(path, params, secret, "590A81E8A62E22A4F685D18B2880734D6E24BC0A"));
    }
}

//! AOP's signature: HMAC-SHA1 over the path and the sorted parameters.
//!
//! <https://open.1688.com/api/sysSignature.htm?ns=cn.alibaba.open>, and the vectors of `tests/golden`.

/// `_aop_signature` for `path` (from `param2/…` on, or empty for authorise links) and parameters.
///
/// Parameters are joined as raw UTF-8 `key + value`, the *joined* texts sorted by bytes; `_aop_signature`
/// itself is left out. Upper-case hex.
#[must_use]
pub fn signature<K: AsRef<str>, V: AsRef<str>>(_path: &str, _params: &[(K, V)], _secret: &str) -> String {
    todo!("platform helper")
}

//! Identity of the Redis server behind a connection, to detect a restart or failover.
//!
//! A failover does not close the connections to the server that was demoted: it goes on answering what is asked, from
//! data that grows old, and refuses what is written. And behind an address that stays the same another server may answer,
//! or the same one with an empty memory. So whoever keeps a connection looks at the server's role and run id now and
//! then, and takes a refused write for a lost server: a new connection leads to the one that took over.

use ::redis::{
    Client, ErrorKind, IntoConnectionInfo, ProtocolVersion, RedisError, RedisResult, ServerErrorKind,
    aio::MultiplexedConnection,
};

/// The address of Redis is none.
#[derive(Debug, thiserror::Error)]
#[error("redis.url cannot be used: {0}")]
pub struct InvalidUrl(#[from] RedisError);

/// A client that speaks RESP3, in which announcements come over the same connection. Connects to nothing.
///
/// # Errors
/// [`InvalidUrl`]
pub fn client(url: &str) -> Result<Client, InvalidUrl> {
    let info = url.into_connection_info()?;
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    Ok(Client::open(info.set_redis_settings(settings))?)
}

/// The run id of the server that this connection leads to: another one after each of its starts.
///
/// # Errors
/// Redis' own; or [`ServerErrorKind::ReadOnly`] for a replica, which takes no writes.
pub async fn run_id(connection: &mut MultiplexedConnection) -> RedisResult<String> {
    let (server, replication): (String, String) =
        ::redis::pipe().cmd("INFO").arg("server").cmd("INFO").arg("replication").query_async(connection).await?;
    // `role:slave`: what it is called on the wire. Proxies that say nothing of roles are believed.
    if field(&replication, "role") == Some("slave") {
        let kind = ErrorKind::Server(ServerErrorKind::ReadOnly);
        return Err(
            (kind, "this server is a replica, perhaps since a failover: redis.url must lead to the primary").into()
        );
    }
    Ok(field(&server, "run_id").unwrap_or_default().to_owned())
}

/// The same for those to whom it is enough that the server answers: empty if the user that we are may not ask.
///
/// # Errors
/// As [`run_id`].
pub async fn run_id_if_told(connection: &mut MultiplexedConnection) -> RedisResult<String> {
    match run_id(connection).await {
        Err(error) if is_forbidden(&error) => Ok(String::new()),
        known => known,
    }
}

/// Whether the connection is of no use any more: it is broken or silent, or its server has been demoted.
#[must_use]
pub fn is_lost(error: &RedisError) -> bool {
    error.is_timeout() || error.is_io_error() || error.is_connection_dropped() || is_demoted(error)
}

/// Whether the server refuses since it is a replica, or one that has lost its primary.
fn is_demoted(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown))
        // Of a write within a script Redis 6 says so in the middle of its sentence.
        || error.to_string().contains("READONLY")
}

/// Whether the user that we are may not ask.
fn is_forbidden(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoPerm) || error.code() == Some("NOPERM")
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_of_redis_information_is_found_by_its_whole_name() {
        let info = "# Replication\r\nrole:slave\r\nmaster_host:127.0.0.1\r\nslave_read_only:1\r\n";
        assert_eq!((field(info, "role"), field(info, "slave"), field(info, "rol")), (Some("slave"), None, None));
    }

    #[test]
    fn a_server_that_takes_no_writes_is_lost_and_one_that_is_loading_or_full_is_not() {
        let error = |kind, text| RedisError::from((kind, "refused", String::from(text)));
        let server = |kind| error(ErrorKind::Server(kind), "");
        assert!(is_lost(&server(ServerErrorKind::ReadOnly)) && is_lost(&server(ServerErrorKind::MasterDown)));
        let redis_6 =
            "ERR Error running script: @user_script:1: -READONLY You can't write against a read only replica.";
        assert!(is_lost(&error(ErrorKind::Server(ServerErrorKind::ResponseError), redis_6)));
        assert!(!is_lost(&server(ServerErrorKind::BusyLoading)));
        assert!(!is_lost(&error(ErrorKind::Extension, "OOM command not allowed when used memory > 'maxmemory'.")));
    }
}

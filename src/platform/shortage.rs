//! What this machine has run out of when a call could not leave it, told from what is the vendor's or an address's.

use std::{error::Error, fmt, io};

use rustix::io::Errno;

/// What is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shortage {
    /// Of this process: `ulimit -n`.
    Descriptors,
    /// Of all processes together.
    SystemDescriptors,
    /// No local port is free, or the address to call from is not this machine's.
    Address,
    /// No port is free for the address that the call leaves from.
    Ports,
    /// Memory, or the kernel's buffers.
    Memory,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Descriptors => {
                "this process has no file descriptor left: raise `ulimit -n` (LimitNOFILE of a systemd unit) or lower \
                 fetch.calls_in_flight_in_all"
            }
            Self::SystemDescriptors => "this machine has no file descriptor left (sysctl fs.file-max)",
            Self::Address | Self::Ports => {
                "this machine has no local port left, or no address to call from (sysctl net.ipv4.ip_local_port_range): lower \
                 fetch.calls_in_flight_in_all"
            }
            Self::Memory => "this machine has no memory left for a connection",
        })
    }
}

impl Shortage {
    fn of_io(error: &io::Error) -> Option<Self> {
        match Errno::from_io_error(error)? {
            Errno::MFILE => Some(Self::Descriptors),
            Errno::NFILE => Some(Self::SystemDescriptors),
            Errno::ADDRNOTAVAIL => Some(Self::Address),
            Errno::ADDRINUSE => Some(Self::Ports),
            Errno::NOMEM | Errno::NOBUFS => Some(Self::Memory),
            _ => None,
        }
    }
}

/// What the error of a call, or what caused it, says is used up.
pub(super) fn of_error(error: &(dyn Error + 'static)) -> Option<Shortage> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(shortage) = error.downcast_ref().and_then(Shortage::of_io) {
            return Some(shortage);
        }
        cause = error.source();
    }
    None
}

/// The same of a connection that could not be opened. The C library says of a name that it could not look up for want of
/// a descriptor only that it failed; so one is asked for here.
pub(super) fn of_connect(error: &(dyn Error + 'static)) -> Option<Shortage> {
    of_error(error).or_else(|| Shortage::of_io(&std::fs::File::open("/dev/null").err()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_up_is_found_beneath_other_words() {
        #[derive(Debug, thiserror::Error)]
        #[error("tcp open error")]
        struct Open(#[source] io::Error);
        let of = |errno: Errno| of_error(&Open(io::Error::from_raw_os_error(errno.raw_os_error())));
        let table = [
            (Errno::MFILE, Some(Shortage::Descriptors)),
            (Errno::NFILE, Some(Shortage::SystemDescriptors)),
            (Errno::ADDRNOTAVAIL, Some(Shortage::Address)),
            (Errno::ADDRINUSE, Some(Shortage::Ports)),
            (Errno::NOMEM, Some(Shortage::Memory)),
            (Errno::NOBUFS, Some(Shortage::Memory)),
            (Errno::CONNREFUSED, None),
            (Errno::HOSTUNREACH, None),
        ];
        for (errno, expected) in table {
            assert_eq!(of(errno), expected, "{errno:?}");
        }
    }
}

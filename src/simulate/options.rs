//! What can be chosen: on the command line as [`Args`], in a program as [`Options`].

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use super::{
    SimulateError,
    aop::TokenRules,
    catalogue::Shares,
    dice::fraction,
    limiter::Quota,
    sides::{SideArgs, SideOptions},
};

/// How a simulator behaves. `..Options::default()` is what the command line has by default, on a free port.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Decides every fate, account and id.
    pub seed: u64,
    /// How many accounts exist.
    pub accounts: usize,
    /// Where to write their secrets, mode 600.
    pub accounts_file: Option<PathBuf>,
    /// Each account's quota.
    pub quota: Quota,
    /// How tokens live and die.
    pub tokens: TokenRules,
    /// The quota of each address that calls come from.
    pub address_quota: Quota,
    /// How long an answer takes.
    pub latency: Latency,
    /// What there is and what goes wrong.
    pub shares: Shares,
    /// Prices go up and down by a tenth within this time; `None`: they stay.
    pub drift: Option<Duration>,
    /// Taobao's accounts.
    pub taobao: SideOptions,
    /// The keys of its resellers.
    pub reseller: SideOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            seed: 7,
            accounts: 100,
            accounts_file: None,
            quota: Quota::Bucket { rate: 10.0, burst: 5 },
            tokens: TokenRules::default(),
            address_quota: Quota::None,
            latency: Latency { from: Duration::from_millis(200), to: Duration::from_millis(500) },
            shares: Shares::default(),
            drift: None,
            taobao: SideOptions::of(100),
            reseller: SideOptions::of(4),
        }
    }
}

impl Options {
    pub(super) fn check(&self) -> Result<(), SimulateError> {
        let wrong = |option, found: String, allowed| Err(SimulateError::Option { option, found, allowed });
        if !(1..=1_000_000).contains(&self.accounts) {
            return wrong("--accounts", self.accounts.to_string(), "from 1 to 1000000");
        }
        self.taobao.check("--taobao-accounts")?;
        self.reseller.check("--reseller-keys")?;
        let [kinds, troubles] = self.shares.sums();
        if kinds > 1.0 {
            return wrong("--absent + --off-shelf", kinds.to_string(), "at most 1");
        }
        if troubles > 1.0 {
            return wrong("--throttled + --failing + --broken + --hopeless", troubles.to_string(), "at most 1");
        }
        match self.quota {
            Quota::Bucket { rate, .. } if !(rate.is_finite() && rate > 0.0) => {
                wrong("--rate", rate.to_string(), "a number above 0")
            }
            // The gateway tells whole seconds.
            _ if self.tokens.life.is_some_and(|life| life < Duration::from_secs(1)) => wrong(
                "--token-life",
                humantime::format_duration(self.tokens.life.unwrap_or_default()).to_string(),
                "at least 1s",
            ),
            Quota::Fixed { window, .. } | Quota::Sliding { window, .. } if window.is_zero() => {
                wrong("--window", "0s".into(), "a duration above 0")
            }
            Quota::Bucket { .. } | Quota::Fixed { .. } | Quota::Sliding { .. } | Quota::None => Ok(()),
        }
    }
}

/// How long an answer takes: even between two durations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latency {
    /// The least.
    pub from: Duration,
    /// The most.
    pub to: Duration,
}

impl Latency {
    /// Answers at once.
    pub const NONE: Self = Self { from: Duration::ZERO, to: Duration::ZERO };

    pub(super) fn pick(self, bits: u64) -> Duration {
        self.from + self.to.saturating_sub(self.from).mul_f64(fraction(bits))
    }
}

/// Reads `200ms..500ms`, or one duration for both.
impl FromStr for Latency {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (from, to) = text.split_once("..").unwrap_or((text, text));
        let (from, to) = (duration(from)?, duration(to)?);
        if from > to { Err(format!("{text} goes backwards")) } else { Ok(Self { from, to }) }
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{text:?}: {error}; write it like 250ms or 2s"))
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        Ok(_) | Err(_) => Err("a share is a number from 0 to 1".into()),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        Ok(_) | Err(_) => Err("a rate is a number above 0".into()),
    }
}

/// The kind of rate limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Limit {
    /// A token bucket: --burst calls at once, then --rate per second.
    Bucket,
    /// At most --rate × --window calls in each window; its borders are the vendor's secret.
    Fixed,
    /// At most --rate × --window calls in any stretch of --window.
    Sliding,
}

const EXAMPLES: &str = "\
Examples:
  # 100 accounts of 10 calls/s that answer after 200 to 500 ms; their secrets for weir
  weir simulate --accounts 100 --write-accounts accounts.toml

  # 10,000 ids to ask for
  weir simulate ids --count 10000 > ids.txt

  # As fast as possible, without failures: for benchmarks
  weir simulate --no-limit --latency 0s --absent 0 --off-shelf 0 --throttled 0 --failing 0 \\
      --broken 0 --hopeless 0

  # Tokens that live half a minute
  weir simulate --token-life 30s --write-accounts accounts.toml

  # 1688 and Taobao, each with its accounts
  weir simulate --write-accounts 1688.toml --taobao-accounts 20 --write-taobao-accounts taobao.toml

  # Every third call to Taobao gets no answer for ten seconds
  curl -d '{\"gateway\":\"taobao\",\"mode\":\"outage\",\"share\":0.3,\"for\":\"10s\"}' localhost:16880/chaos

  # Its statistics; `violations` must be 0
  curl -s localhost:16880/stats";

/// Simulate the vendors' servers: 1688's gateway and Taobao's, with their signature checks, quotas and failures.
///
/// 1688: POST and GET /openapi/param2/1/com.alibaba.product/alibaba.product.get/{app key} and checks as the
/// real gateway does: API, app key, signature, call frequency, token, parameters. A call over an account's quota,
/// judged by the time at which it arrived, is refused with gw.QosAppFrequencyLimit and counted as a violation.
///
/// Any item id can be asked for. The seed decides what is under it (a product, nothing, a product that is no
/// longer sold) and how asking for it goes wrong, so that two runs with one seed agree on every item.
///
/// POST /openapi/http/1/system.oauth2/getToken/{app key} renews tokens, and gives some for a code of the page
/// GET /oauth/authorize, whose user always agrees; both count against the quota like any call.
///
/// Taobao: /router/rest (TOP: one item, or up to 20, 40 or 50; a call over a quota is answered with code 7 and a ban of
/// a second or two), /ibrad/taobao/item_get/ (a reseller, up to 40 ids a call) and /taobao/item_get/ (OneBound, one id).
/// 1688 as two articles have it: /router/json, and /openapi/param2/1/alibaba.item.get/2.0, which bans with HTTP 403.
///
/// POST /chaos makes an outage: {"gateway":"taobao","mode":"outage","share":1.0,"for":"10s"}. Modes: outage, slow (with
/// a "delay"), errors (the vendor's own) and off. Without a gateway, all of them; without a time, until the next order.
///
/// Also served: GET /stats (counts, by gateway too), POST /reset (counts to zero), POST /revoke/{alias} (its user withdraws the
/// authorisation), GET /healthz.
#[allow(clippy::doc_markdown, reason = "it is read on a terminal")]
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES, args_conflicts_with_subcommands = false)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// The seed of every item's outcome, the accounts and the sample ids.
    #[arg(long, default_value_t = 7, global = true)]
    seed: u64,
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:16880", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// How many accounts exist.
    #[arg(long, default_value_t = 100, value_name = "COUNT")]
    accounts: usize,
    /// Write the accounts with their secrets to this file (TOML, readable by you only) before listening.
    #[arg(long, value_name = "FILE")]
    write_accounts: Option<PathBuf>,
    /// Calls per second and account.
    #[arg(long, default_value_t = 10.0, value_parser = rate, help_heading = "Quota")]
    rate: f64,
    /// Calls at once after a pause (--limit bucket).
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Quota")]
    burst: u32,
    /// The kind of rate limit.
    #[arg(long, value_enum, default_value_t = Limit::Bucket, help_heading = "Quota")]
    limit: Limit,
    /// The window of --limit fixed and sliding.
    #[arg(long, default_value = "1s", value_parser = duration, help_heading = "Quota")]
    window: Duration,
    /// No quota of accounts at all.
    #[arg(long, help_heading = "Quota")]
    no_limit: bool,
    /// How long an access token lives; without it, for ever.
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Tokens")]
    token_life: Option<Duration>,
    /// A renewal ends the access token and the refresh token before it at once.
    #[arg(long, help_heading = "Tokens")]
    token_rotation: bool,
    /// Calls per second and address that calls come from, in any stretch of a second; without it any number.
    #[arg(long, value_name = "CALLS", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Quota")]
    address_rate: Option<u32>,
    /// How long an answer takes: one duration, or two for evenly between them. Refusals take no time.
    #[arg(long, default_value = "200ms..500ms", value_name = "FROM..TO", help_heading = "World")]
    latency: Latency,
    /// Share of ids that no product has.
    #[arg(long, default_value_t = 0.02, value_parser = share, value_name = "SHARE", help_heading = "World")]
    absent: f64,
    /// Share of products that are no longer sold.
    #[arg(long, default_value_t = 0.03, value_parser = share, value_name = "SHARE", help_heading = "World")]
    off_shelf: f64,
    /// Share of items whose first one or two calls are throttled although within the quota.
    #[arg(long, default_value_t = 0.005, value_parser = share, value_name = "SHARE", help_heading = "World")]
    throttled: f64,
    /// Share of items whose first one to three calls fail with an outage: a timeout, HTTP 500 or 502, a closed
    /// connection.
    #[arg(long, default_value_t = 0.01, value_parser = share, value_name = "SHARE", help_heading = "World")]
    failing: f64,
    /// Share of items whose first one or two replies are malformed: half a JSON, a page, another item.
    #[arg(long, default_value_t = 0.002, value_parser = share, value_name = "SHARE", help_heading = "World")]
    broken: f64,
    /// Share of items whose calls always fail with an outage.
    #[arg(long, default_value_t = 0.0005, value_parser = share, value_name = "SHARE", help_heading = "World")]
    hopeless: f64,
    /// Prices go up and down by a tenth within this time.
    #[arg(
        long, value_name = "PERIOD", value_parser = duration, num_args = 0..=1, require_equals = true,
        default_missing_value = "6h", help_heading = "World"
    )]
    drift: Option<Duration>,
    #[command(flatten)]
    sides: SideArgs,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Command {
    /// Print sample item ids, one per line: 12 digits, distinct, the same for the same seed.
    Ids {
        /// How many.
        #[arg(long, default_value_t = 10_000)]
        count: usize,
    },
}

impl Args {
    /// How many ids to print, if that is what is wanted.
    pub(super) fn sample_ids(&self) -> Option<usize> {
        self.command.as_ref().map(|Command::Ids { count }| *count)
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    /// What the server is to do.
    ///
    /// # Errors
    /// [`SimulateError::Option`] if options that are each possible make no sense together.
    pub fn into_options(self) -> Result<Options, SimulateError> {
        let quota = self.quota();
        let [taobao, reseller] = self.sides.into_options(self.no_limit);
        let options = Options {
            quota,
            taobao,
            reseller,
            tokens: TokenRules { life: self.token_life, rotation: self.token_rotation },
            address_quota: self.address_rate.map_or(Quota::None, |calls| {
                let window = Duration::from_secs(1);
                Quota::Sliding { calls, window }
            }),
            listen: self.listen,
            seed: self.seed,
            accounts: self.accounts,
            accounts_file: self.write_accounts,
            latency: self.latency,
            shares: Shares {
                absent: self.absent,
                off_shelf: self.off_shelf,
                throttled: self.throttled,
                failing: self.failing,
                broken: self.broken,
                hopeless: self.hopeless,
            },
            drift: self.drift,
        };
        options.check().map(|()| options)
    }

    fn quota(&self) -> Quota {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a float cast saturates, and the rate is above 0"
        )]
        let calls = ((self.rate * self.window.as_secs_f64()).round() as u32).max(1);
        match self.limit {
            _ if self.no_limit => Quota::None,
            Limit::Bucket => Quota::Bucket { rate: self.rate, burst: self.burst },
            Limit::Fixed => Quota::Fixed { calls, window: self.window },
            Limit::Sliding => Quota::Sliding { calls, window: self.window },
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Weir {
        #[command(subcommand)]
        command: Top,
    }

    #[derive(clap::Subcommand)]
    enum Top {
        Simulate(Args),
    }

    fn parse(line: &str) -> Result<Args, String> {
        let Top::Simulate(args) = Weir::try_parse_from(["weir", "simulate"].into_iter().chain(line.split_whitespace()))
            .map_err(|error| error.to_string())?
            .command;
        Ok(args)
    }

    fn options(line: &str) -> Options {
        parse(line).unwrap().into_options().unwrap()
    }

    #[test]
    fn the_command_line_and_the_program_have_the_same_defaults() {
        let listen = Options::default().listen;
        assert_eq!(Options { listen, ..options("") }, Options::default());
    }

    #[test]
    fn each_way_of_counting_can_be_chosen() {
        let window = Duration::from_secs(2);
        assert_eq!(options("--rate 3 --burst 2").quota, Quota::Bucket { rate: 3.0, burst: 2 });
        assert_eq!(options("--limit fixed --window 2s").quota, Quota::Fixed { calls: 20, window });
        assert_eq!(options("--limit sliding --window 2s --rate 4").quota, Quota::Sliding { calls: 8, window });
        assert_eq!(options("--no-limit").quota, Quota::None);
    }

    #[test]
    fn addresses_have_a_quota_if_it_is_asked_for() {
        let window = Duration::from_secs(1);
        assert_eq!(options("--address-rate 99").address_quota, Quota::Sliding { calls: 99, window });
        assert_eq!(options("").address_quota, Quota::None);
        assert!(parse("--address-rate 0").unwrap_err().contains("address-rate"));
    }

    #[test]
    fn latency_and_drift_are_read() {
        let ms = Duration::from_millis;
        assert_eq!(options("--latency 20ms").latency, Latency { from: ms(20), to: ms(20) });
        assert_eq!(options("--latency 5ms..1s").latency, Latency { from: ms(5), to: ms(1_000) });
        assert_eq!(options("--drift").drift, Some(Duration::from_secs(21_600)));
        assert_eq!(options("--drift=10m").drift, Some(Duration::from_secs(600)));
    }

    #[test]
    fn ids_take_the_seed_on_either_side() {
        for line in ["ids --count 5 --seed 9", "--seed 9 ids --count 5"] {
            let args = parse(line).unwrap();
            assert_eq!((args.sample_ids(), args.seed()), (Some(5), 9), "{line}");
        }
        assert_eq!(parse("").unwrap().sample_ids(), None);
    }

    #[test]
    fn nonsense_is_refused_with_what_is_allowed() {
        let lines = [
            ("--absent 1.5", "from 0 to 1"),
            ("--rate 0", "above 0"),
            ("--burst 0", "burst"),
            ("--latency 2s..1s", "backwards"),
            ("--latency soon", "250ms"),
            ("--accounts 0", "from 1 to 1000000"),
            ("--token-life 300ms", "at least 1s"),
            ("--absent 0.6 --off-shelf 0.6", "at most 1"),
            ("--failing 0.6 --broken 0.6", "at most 1"),
            ("--limit fixed --window 0s", "above 0"),
        ];
        for (line, expected) in lines {
            let error =
                parse(line).and_then(|args| args.into_options().map_err(|error| error.to_string())).expect_err(line);
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn the_help_says_what_it_is_and_gives_an_example() {
        let mut weir = Weir::command();
        let help = weir.find_subcommand_mut("simulate").unwrap().render_long_help().to_string();
        for text in [
            "1688's gateway",
            "POST /chaos",
            "/router/rest",
            "weir simulate ids --count 10000",
            "/stats",
            "gw.QosAppFrequencyLimit",
        ] {
            assert!(help.contains(text), "{text:?} is not in:\n{help}");
        }
    }

    #[test]
    fn a_latency_is_picked_between_its_ends() {
        let latency: Latency = "200ms..500ms".parse().unwrap();
        assert_eq!(latency.pick(0), Duration::from_millis(200));
        let most = latency.pick(u64::MAX);
        assert!(most <= Duration::from_millis(500) && most > Duration::from_millis(499), "{most:?}");
        assert_eq!(Latency::NONE.pick(u64::MAX), Duration::ZERO);
    }
}

//! How often and how long to try again: exponential back-off with bounded patience.

use super::{HubError, Result};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

/// Waits between attempts. Patience is measured from the last byte that came, stalls and waits included.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    /// The first wait; it doubles with each failure in a row, and begins anew once bytes came.
    pub first_wait: Duration,
    pub longest_wait: Duration,
    /// `Retry-After` is honoured up to this long.
    pub longest_asked_wait: Duration,
    /// Patience with a host that cannot be connected to, before the hub has answered once: no network fails soon.
    pub connect_patience: Duration,
    /// Patience with other failures before the hub has answered once.
    pub first_patience: Duration,
    /// Patience later: an outage of some minutes does not end a run of days.
    pub patience: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            first_wait: Duration::from_millis(100),
            longest_wait: Duration::from_secs(30),
            longest_asked_wait: Duration::from_secs(300),
            connect_patience: Duration::from_secs(15),
            first_patience: Duration::from_secs(60),
            patience: Duration::from_secs(900),
        }
    }
}

impl RetryPolicy {
    /// The wait after the `failures`-th failure in a row (1, 2, ...), without the jitter.
    fn wait(&self, failures: u32) -> Duration {
        let factor = 1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
        self.first_wait.saturating_mul(factor).min(self.longest_wait)
    }
}

/// Whether the hub has answered this process before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contact {
    None,
    Made,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// No connection.
    Unreachable,
    /// Stalls, dropped bodies, 5xx, refusals of another host than the hub.
    Network,
    /// 429.
    RateLimited,
    /// A body that is not the one asked for; a second and third look only.
    WrongBody,
}

/// A failure that may pass.
#[derive(Debug)]
pub(super) struct Trouble {
    pub cause: Cause,
    pub text: String,
    /// What `Retry-After` asks for.
    pub asked_wait: Option<Duration>,
}

impl Trouble {
    pub fn new(cause: Cause, text: impl Into<String>) -> Self {
        Self { cause, text: text.into(), asked_wait: None }
    }
}

const WRONG_BODIES: u32 = 3;

/// The attempts at one thing.
pub(super) struct Attempts<'a> {
    policy: &'a RetryPolicy,
    what: String,
    has_token: bool,
    since: Instant,
    failures_in_a_row: u32,
    wrong_bodies: u32,
}

impl<'a> Attempts<'a> {
    pub fn new(policy: &'a RetryPolicy, what: String, has_token: bool) -> Self {
        Self { policy, what, has_token, since: Instant::now(), failures_in_a_row: 0, wrong_bodies: 0 }
    }

    /// Bytes came: back-off and patience begin anew.
    pub fn progressed(&mut self) {
        (self.since, self.failures_in_a_row) = (Instant::now(), 0);
    }

    /// Waits before the next attempt, or gives up.
    pub fn wait(&mut self, trouble: Trouble, contact: Contact) -> Result<()> {
        self.failures_in_a_row += 1;
        self.wrong_bodies += u32::from(trouble.cause == Cause::WrongBody);
        if self.wrong_bodies >= WRONG_BODIES {
            return Err(HubError::Corrupt { what: self.what.clone(), problem: trouble.text });
        }
        let wait = match trouble.asked_wait {
            Some(asked) => asked.clamp(self.policy.first_wait, self.policy.longest_asked_wait),
            None => self.policy.wait(self.failures_in_a_row),
        };
        // Several ranks that were refused together should not come back together.
        let jitter = RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64;
        let wait = wait.mul_f64(1.0 + jitter / 4.0);
        let patience = match (trouble.cause, contact) {
            (Cause::Unreachable, Contact::None) => self.policy.connect_patience,
            (Cause::Network, Contact::None) => self.policy.first_patience,
            _ => self.policy.patience,
        };
        let waited = self.since.elapsed();
        if waited + wait > patience {
            let (what, attempts) = (self.what.clone(), self.failures_in_a_row);
            return Err(match trouble.cause {
                Cause::RateLimited => {
                    HubError::RateLimited { what, message: trouble.text, waited, token: self.has_token }
                }
                _ => HubError::GivenUp { what, attempts, waited, cause: trouble.text },
            });
        }
        tracing::warn!(
            "{}: {} (failure {} in a row); trying again in {:.1} s",
            self.what,
            trouble.text,
            self.failures_in_a_row,
            wait.as_secs_f64()
        );
        std::thread::sleep(wait);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short() -> RetryPolicy {
        let ms = Duration::from_millis;
        RetryPolicy {
            first_wait: ms(1),
            longest_wait: ms(4),
            longest_asked_wait: ms(20),
            connect_patience: ms(50),
            first_patience: ms(250),
            patience: ms(1000),
        }
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let policy = RetryPolicy::default();
        let seconds: Vec<f64> = (1..=11).map(|n| policy.wait(n).as_secs_f64()).collect();
        assert_eq!(seconds, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]);
        assert_eq!(policy.wait(u32::MAX).as_secs(), 30);
    }

    /// How long a failure that never passes is tried.
    fn until_the_end(cause: Cause, contact: Contact) -> (Duration, HubError) {
        let policy = short();
        let mut attempts = Attempts::new(&policy, "it".into(), false);
        let start = Instant::now();
        loop {
            if let Err(error) = attempts.wait(Trouble::new(cause, "broken"), contact) {
                return (start.elapsed(), error);
            }
        }
    }

    #[test]
    fn patience_is_short_before_first_contact_longer_after_and_always_bounded() {
        let (unreachable, error) = until_the_end(Cause::Unreachable, Contact::None);
        assert!(matches!(error, HubError::GivenUp { attempts: 2.., .. }), "{error}");
        let (first, error) = until_the_end(Cause::Network, Contact::None);
        assert!(error.to_string().contains("broken"), "{error}");
        let (later, _) = until_the_end(Cause::Unreachable, Contact::Made);
        // Each ends at the last wait that still fits; the gaps leave a busy machine room.
        let ms = [unreachable, first, later].map(|time| time.as_millis());
        assert!(ms[0] < 245 && ms[1] >= 245 && ms[1] < 995 && ms[2] >= 995, "{ms:?}");
        let (_, error) = until_the_end(Cause::RateLimited, Contact::None);
        assert!(matches!(error, HubError::RateLimited { .. }) && error.to_string().contains("HF_TOKEN"), "{error}");
    }

    #[test]
    fn a_wrong_body_is_tried_three_times_in_all() {
        let policy = short();
        let mut attempts = Attempts::new(&policy, "it".into(), false);
        let mut wrong = || attempts.wait(Trouble::new(Cause::WrongBody, "html"), Contact::Made);
        assert!(wrong().is_ok() && wrong().is_ok());
        assert!(matches!(wrong(), Err(HubError::Corrupt { .. })));
    }

    #[test]
    fn retry_after_is_honoured_up_to_the_cap() {
        let policy = short();
        for (asked, at_least, below) in [(15, 15, 2000), (60_000, 20, 2000)] {
            let mut attempts = Attempts::new(&policy, "it".into(), true);
            let trouble =
                Trouble { asked_wait: Some(Duration::from_millis(asked)), ..Trouble::new(Cause::RateLimited, "429") };
            let start = Instant::now();
            assert!(attempts.wait(trouble, Contact::Made).is_ok());
            let took = start.elapsed().as_millis();
            assert!((at_least..below).contains(&took), "{asked}: {took}");
        }
    }
}

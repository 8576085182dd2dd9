//! How fast a line is: bytes of no meaning are fetched, more each time, until fetching them took long enough to tell; then
//! as many again, twice.
//!
//! The fastest fetch of the largest size is the figure: what else a machine does only makes a line look slower, and smaller
//! ones may pass in a burst.
//! The figure is what a fetch gets, checksums and hashes included: what nodes will see of the line, no more. One that is busy
//! with other transfers looks slower. Not here: who asks, and which lines (`coordinator::links`).

use super::{Blob, DataClient, Fetched, Patience};
use crate::{BlobName, Fetch};
use bytes::Bytes;
use halfstep_work::{FailureClass, JobId, SourceError};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Bytes of a probe at most: 3 ms of a 10 Gbit/s line.
pub const PROBE_MAX: u32 = 4 << 20;
/// Bytes of the first one that counts: a tenth of a second of a 1 Mbit/s line.
const FIRST: u32 = 16 << 10;
/// How much larger the next one is.
const FACTOR: u32 = 4;
/// A fetch that takes so long tells enough.
const ENOUGH: Duration = Duration::from_millis(200);
/// Fetches of the largest size.
const AGAIN: u32 = 3;

/// So many bytes of no meaning, at most `PROBE_MAX`: such as nothing on the way can shorten.
pub fn probe(bytes: u32) -> Blob {
    let words = bytes.min(PROBE_MAX).div_ceil(8);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut content = Vec::with_capacity(words as usize * 8);
    for _ in 0..words {
        // Xorshift, Marsaglia 2003.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        content.extend_from_slice(&state.to_le_bytes());
    }
    content.truncate(bytes as usize);
    Blob::new(Bytes::from(content))
}

/// What has been fetched: the largest size so far, how often, how fast at best.
#[derive(Clone, Copy, Debug, Default)]
struct Rounds {
    bytes: u32,
    count: u32,
    best: Duration,
}

impl Rounds {
    fn add(&mut self, bytes: u32, took: Duration) {
        *self = match bytes == self.bytes {
            true => Self { bytes, count: self.count + 1, best: self.best.min(took) },
            false => Self { bytes, count: 1, best: took },
        };
    }

    /// Bytes of the next fetch; none if enough is known, or one more would be too late.
    fn next(&self, left: Duration) -> Option<u32> {
        let larger = self.bytes < PROBE_MAX && self.best < ENOUGH && self.best * FACTOR < left;
        match self.count {
            0 => Some(FIRST),
            _ if larger => Some((self.bytes * FACTOR).min(PROBE_MAX)),
            count => (count < AGAIN && self.best < left).then_some(self.bytes),
        }
    }

    /// Bytes per second.
    fn rate(&self) -> Option<u64> {
        let rate = f64::from(self.bytes) / self.best.as_secs_f64().max(1e-9);
        // A float as an integer stops at the ends.
        (self.count > 0).then(|| (rate as u64).max(1))
    }
}

impl DataClient {
    /// Bytes per second that come from this peer, a node, now. Takes `limit` at most.
    ///
    /// # Errors
    /// `PeerLost` if nothing came in that time; the peer's class if it sends no probes.
    pub async fn measure(&self, limit: Duration) -> Result<u64, SourceError> {
        let ends = Instant::now() + limit;
        let patience = Patience { attempts: 1, header: limit, chunk: limit, ..Patience::default() };
        let client = self.clone().with_patience(patience);
        // Connecting and greeting are no part of a line's speed.
        client.fetch_probe(1, ends).await?;
        let mut rounds = Rounds::default();
        while let Some(bytes) = rounds.next(ends.saturating_duration_since(Instant::now())) {
            let began = Instant::now();
            match client.fetch_probe(bytes, ends).await {
                Ok(()) => rounds.add(bytes, began.elapsed()),
                Err(_) if rounds.count > 0 => break,
                Err(error) => return Err(error),
            }
        }
        rounds.rate().ok_or_else(|| self.nonsense("nothing was measured"))
    }

    async fn fetch_probe(&self, bytes: u32, ends: Instant) -> Result<(), SourceError> {
        let fetch = Fetch::new(JobId([0; 16]), BlobName::Probe(bytes));
        let left = ends.saturating_duration_since(Instant::now());
        let late = |_| {
            let what = format!("{}: {bytes} bytes did not come in time", self.peer);
            SourceError::new(FailureClass::PeerLost, what)
        };
        match timeout(left, self.fetch(fetch, u64::from(PROBE_MAX))).await.map_err(late)?? {
            Fetched::Blob { bytes: came, .. } if came.len() == bytes as usize => Ok(()),
            other => {
                let found = match other {
                    Fetched::Blob { bytes, .. } => format!("{} bytes", bytes.len()),
                    Fetched::Same | Fetched::None => "nothing".to_owned(),
                };
                Err(self.nonsense(&format!("expected a probe of {bytes} bytes, found {found}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Tamper, Traffic};
    use super::*;
    use crate::testing::{Fake, start};
    use crate::{BlobHash, Security, Transport};
    use std::sync::Arc;

    const LIMIT: Duration = Duration::from_millis(1800);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Probes over a line that carries so many bytes a second after a pause; the first `late` fetches take three times as
    /// long.
    fn simulated(speed: f64, pause: Duration, late: u32) -> Option<(u64, Duration)> {
        let (mut spent, mut fetches, mut rounds) = (pause, 0, Rounds::default());
        while let Some(bytes) = rounds.next(LIMIT.saturating_sub(spent)) {
            let took = pause + Duration::from_secs_f64(f64::from(bytes) / speed);
            let took = if fetches < late { took * 3 } else { took };
            fetches += 1;
            if spent + took > LIMIT {
                break;
            }
            spent += took;
            rounds.add(bytes, took);
        }
        Some((rounds.rate()?, spent))
    }

    #[test]
    fn lines_of_every_speed_are_told_within_a_third_and_in_time() {
        let mbit = 1e6 / 8.0;
        for speed in [0.1, 1.0, 3.7, 10.0, 100.0, 1000.0, 10_000.0] {
            // Where a fetch that was held up still leaves time for another.
            for late in if speed < 1.0 { 0..1 } else { 0..2 } {
                let (told, spent) = simulated(speed * mbit, ms(0), late).unwrap();
                let ratio = told as f64 / (speed * mbit);
                assert!((0.75..1.34).contains(&ratio), "{speed} Mbit/s, {late} late: told {told}, {ratio}");
                assert!(spent <= LIMIT, "{speed} Mbit/s: {spent:?}");
            }
        }
        // 16 KiB do not come in time over 56 kbit/s: no figure, rather than a wrong one.
        assert_eq!(simulated(0.056 * mbit, ms(0), 0), None);
        // A far line is what a fetch over it gets: no less than a third of 100 Mbit/s with an answer after 50 ms.
        let (told, _) = simulated(100.0 * mbit, ms(50), 0).unwrap();
        assert!(told as f64 > 100.0 * mbit / 3.0, "{told}");
    }

    #[test]
    fn a_probe_has_the_bytes_asked_for_and_no_two_alike_in_a_row() {
        for bytes in [0, 1, 7, 8, 9, FIRST, PROBE_MAX, u32::MAX] {
            let Blob::Bytes { bytes: content, hash } = probe(bytes) else { panic!("not in memory") };
            assert_eq!(content.len(), bytes.min(PROBE_MAX) as usize);
            assert_eq!(hash, BlobHash::of(&content));
        }
        let Blob::Bytes { bytes, .. } = probe(FIRST) else { panic!("not in memory") };
        let mut words: Vec<&[u8]> = bytes.chunks(8).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), FIRST as usize / 8);
    }

    #[tokio::test]
    async fn a_line_over_loopback_is_measured() {
        let transport = Transport::tcp(Security::Plaintext);
        let fake = Fake::default();
        let (_served, connector) = start(&transport, "127.0.0.1:0", &fake).await;
        let traffic = Traffic::default();
        let rate = DataClient::new(&connector, traffic.clone()).measure(ms(5000)).await.unwrap();
        // Whatever the machine does meanwhile: more than 1 Mbit/s, less than a terabit.
        assert!((125_000..125_000_000_000).contains(&rate), "{rate}");
        assert!(traffic.received() > u64::from(FIRST));
    }

    #[tokio::test]
    async fn a_peer_that_stops_after_the_first_figures_is_told_by_those() {
        let slow: Tamper = Arc::new(|chunk| {
            if chunk.data.len() > FIRST as usize {
                return Err(tonic::Status::unavailable("cut"));
            }
            Ok(())
        });
        let fake = Fake { traffic: Traffic::default().tampered(slow), ..Fake::default() };
        let (_served, connector) = start(&Transport::memory(), "", &fake).await;
        let client = DataClient::new(&connector, Traffic::default());
        assert!(client.measure(ms(5000)).await.unwrap() > 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_says_nothing_has_no_figure_in_time() {
        // Listens, and never answers.
        let transport = Transport::memory();
        let listener = transport.listen("").await.unwrap();
        let connector = transport.connector(&listener.address(), crate::Role::Node);
        let began = Instant::now();
        let error = DataClient::new(&connector, Traffic::default()).measure(ms(1800)).await.unwrap_err();
        assert_eq!(error.class, FailureClass::PeerLost);
        assert!(began.elapsed() <= ms(1900), "{:?}", began.elapsed());
    }
}

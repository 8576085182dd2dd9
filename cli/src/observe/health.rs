//! The health of this process as grpc.health.v1, for probes of Kubernetes and of people.
//!
//! ```text
//!   service    serving when
//!   startup    what it needs to begin is there: once, then always
//!   readiness  it takes part now; not while it waits for its coordinator or drains
//!   ""         as readiness
//!   liveness   it answers at all: no coordinator, device or disk can change that
//! ```
//! Not here: the port's thread (`observe`), who may ask (`proto::roles`).

use halfstep_proto::{Listener, Services};
use tokio::sync::watch;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};

/// How it is, changed by whoever runs the process and told to whoever asks; clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Health(watch::Sender<Condition>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Condition {
    started: bool,
    ready: bool,
}

impl Default for Health {
    fn default() -> Self {
        Self(watch::Sender::new(Condition::default()))
    }
}

impl Health {
    /// It has begun.
    pub(crate) fn started(&self) {
        self.0.send_modify(|condition| condition.started = true);
    }

    /// It takes part, or does not any more.
    pub(crate) fn ready(&self, ready: bool) {
        self.0.send_modify(|condition| condition.ready = ready);
    }

    /// Answers for as long as the process lives.
    pub(super) async fn answer(self, listener: Listener) {
        let (reporter, service) = health_reporter();
        let mut condition = self.0.subscribe();
        // Before the first answer.
        let first = *condition.borrow_and_update();
        report(&reporter, first).await;
        let follow = async {
            // This handle holds a sender, so there is always one.
            while condition.changed().await.is_ok() {
                let now = *condition.borrow_and_update();
                report(&reporter, now).await;
            }
        };
        tokio::select! {
            served = Services::new().with(service).serve(listener, std::future::pending()) => {
                if let Err(error) = served {
                    tracing::error!(%error, "health is not answered any more");
                }
            }
            () = follow => {}
        }
    }
}

async fn report(reporter: &HealthReporter, condition: Condition) {
    let status = |good| if good { ServingStatus::Serving } else { ServingStatus::NotServing };
    for (service, good) in [
        ("startup", condition.started),
        ("readiness", condition.ready),
        ("", condition.ready),
        ("liveness", true),
    ] {
        reporter.set_service_status(service, status(good)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_proto::{Role, Security, Transport};
    use std::time::Duration;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus as Answer;
    use tonic_health::pb::health_client::HealthClient;

    type Client = HealthClient<tonic::transport::Channel>;

    async fn ask(client: &mut Client, service: &str) -> Result<Answer, tonic::Code> {
        let answer = client.check(HealthCheckRequest { service: service.into() }).await;
        answer.map(|answer| answer.into_inner().status()).map_err(|status| status.code())
    }

    /// Startup, readiness, the empty name, liveness.
    async fn all(client: &mut Client) -> [bool; 4] {
        let mut serving = [false; 4];
        for (answer, service) in serving.iter_mut().zip(["startup", "readiness", "", "liveness"]) {
            *answer = ask(client, service).await.unwrap() == Answer::Serving;
        }
        serving
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn probes_see_what_was_said_last() {
        let transport = Transport::tcp(Security::Public);
        let listener = transport.listen("127.0.0.1:0").await.unwrap();
        let address = listener.address();
        let health = Health::default();
        tokio::spawn(health.clone().answer(listener));
        let mut client = HealthClient::new(transport.connector(&address, Role::Node).channel());
        assert_eq!(all(&mut client).await, [false, false, false, true], "before anything is said");
        assert_eq!(ask(&mut client, "nonsense").await, Err(tonic::Code::NotFound));
        for (say, expect) in [
            (&(|health: &Health| health.started()) as &dyn Fn(&Health), [true, false, false, true]),
            (&|health| health.ready(true), [true, true, true, true]),
            (&|health| health.ready(false), [true, false, false, true]),
        ] {
            say(&health);
            // What is said arrives a moment later.
            let arrived = async {
                while all(&mut client).await != expect {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), arrived).await.expect("it is told to probes");
        }
    }
}

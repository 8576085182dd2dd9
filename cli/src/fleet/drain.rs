//! `drain`: a node hands back its work and leaves, for good.

use std::time::{Duration, Instant};

use halfstep_proto::{hello, wire};

use super::args::DrainArgs;
use super::connect::Line;
use super::jobs::ask;
use super::present::nodes_of;
use crate::commands::print;
use crate::exit::{CliError, Exit};

/// A node leaves within five seconds, whatever it works on.
const GONE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(100);

/// Asks, and waits until it has left.
///
/// # Errors
/// If there is no such node or it does not leave.
pub(crate) fn drain(arguments: &DrainArgs) -> Result<Exit, CliError> {
    let said = ask(&arguments.connect, async |line: &Line| {
        let request = wire::DrainRequest { hello: Some(hello()), node: arguments.node.clone() };
        let reply = line.jobs.clone().drain(request).await;
        let wire::DrainReply { node, name, leases } =
            reply.map_err(|status| line.refused(&status))?.into_inner();
        let began = Instant::now();
        while is_there(line, node).await? {
            if began.elapsed() > GONE {
                let still = format!("node-{node} `{name}`: is still there after {} s", GONE.as_secs());
                return Err(
                    CliError::new(Exit::Interrupted, still).hint("`halfstep nodes` shows what it does")
                );
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(format!("node-{node} `{name}` has left; leases in its hands when it was asked: {leases}\n"))
    })?;
    print(&said)?;
    Ok(Exit::Solved)
}

async fn is_there(line: &Line, node: u32) -> Result<bool, CliError> {
    let nodes = nodes_of(line, false).await?.nodes;
    Ok(nodes.iter().any(|known| known.node == node))
}

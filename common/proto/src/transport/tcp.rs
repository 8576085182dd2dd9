//! Connections over TCP, tuned so that a dead peer is soon told from a slow one and a ping passes a bulk transfer.

use super::{Accept, Accepted, BoxIo, Network, TransportError};
use std::io;
use std::net::SocketAddr;
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tonic::codegen::BoxFuture;

/// TCP, without Nagle's delay.
pub struct Tcp {
    loopback_only: bool,
}

impl Tcp {
    /// `loopback_only`: refuse addresses any of whose meanings is not on this machine.
    pub fn new(loopback_only: bool) -> Self {
        Self { loopback_only }
    }
}

/// A peer that acknowledges nothing for so long is gone. Slow links and slow programs do acknowledge.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED: std::time::Duration = std::time::Duration::from_secs(15);
/// Bytes that wait in the kernel to be sent for the first time: what a ping has to wait for on a slow link.
#[cfg(target_os = "linux")]
const UNSENT: u32 = 128 << 10;

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    {
        let socket = socket2::SockRef::from(stream);
        socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
        socket.set_tcp_notsent_lowat(UNSENT)?;
    }
    Ok(())
}

/// All that `address` means, checked before any of it is used, and not resolved a second time.
async fn resolve(address: &str, loopback_only: bool) -> Result<Vec<SocketAddr>, TransportError> {
    let failed = |source| TransportError::Resolve { address: address.to_owned(), source };
    let found: Vec<SocketAddr> = lookup_host(address).await.map_err(failed)?.collect();
    if found.is_empty() {
        return Err(failed(io::Error::other("no address has this name")));
    }
    match found.iter().find(|found| loopback_only && !found.ip().to_canonical().is_loopback()) {
        Some(found) => Err(TransportError::NotLoopback { address: address.to_owned(), found: found.ip() }),
        None => Ok(found),
    }
}

impl Network for Tcp {
    fn connect(&self, address: String) -> BoxFuture<BoxIo, TransportError> {
        let loopback_only = self.loopback_only;
        Box::pin(async move {
            let addresses = resolve(&address, loopback_only).await?;
            let connected = async {
                let stream = TcpStream::connect(addresses.as_slice()).await?;
                tune(&stream)?;
                Ok(stream)
            };
            match connected.await {
                Ok(stream) => Ok(Box::new(stream) as BoxIo),
                Err(error) => {
                    let error: io::Error = error;
                    Err(TransportError::Connect { address, message: error.to_string() })
                }
            }
        })
    }

    fn listen(&self, address: String) -> BoxFuture<Box<dyn Accept>, TransportError> {
        let loopback_only = self.loopback_only;
        Box::pin(async move {
            let addresses = resolve(&address, loopback_only).await?;
            let failed = |source| TransportError::Listen { address: address.clone(), source };
            let listener = TcpListener::bind(addresses.as_slice()).await.map_err(failed)?;
            let local = listener.local_addr().map_err(failed)?;
            Ok(Box::new(Bound { listener, local }) as Box<dyn Accept>)
        })
    }
}

struct Bound {
    listener: TcpListener,
    local: SocketAddr,
}

impl Accept for Bound {
    fn accept(&mut self) -> Accepted<'_> {
        Box::pin(async {
            let (stream, from) = self.listener.accept().await?;
            tune(&stream)?;
            Ok((Box::new(stream) as BoxIo, from.ip().to_canonical().to_string()))
        })
    }

    fn address(&self) -> String {
        self.local.to_string()
    }
}

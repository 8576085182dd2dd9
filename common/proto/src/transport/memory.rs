//! Connections within a process.

use super::{Accept, Accepted, BoxIo, Network, TransportError};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{DuplexStream, duplex};
use tokio::sync::mpsc;
use tonic::codegen::BoxFuture;

/// Bytes on the way in one direction.
const BUFFER: usize = 1 << 20;
/// Connections that wait to be accepted.
const BACKLOG: usize = 64;

/// A network of named places in the memory of this process; clones are the same network.
#[derive(Clone, Default)]
pub struct Memory {
    places: Arc<Mutex<Places>>,
}

#[derive(Default)]
struct Places {
    taken: u64,
    open: BTreeMap<String, mpsc::Sender<DuplexStream>>,
}

impl Memory {
    fn with<T>(&self, f: impl FnOnce(&mut Places) -> T) -> T {
        f(&mut self.places.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn open(&self, address: String) -> Result<Place, TransportError> {
        let (sender, arriving) = mpsc::channel(BACKLOG);
        let address = self.with(|places| {
            places.taken += 1;
            let address = if address.is_empty() { format!("memory-{}", places.taken) } else { address };
            if places.open.get(&address).is_some_and(|other| !other.is_closed()) {
                let source = io::Error::from(io::ErrorKind::AddrInUse);
                return Err(TransportError::Listen { address, source });
            }
            places.open.insert(address.clone(), sender);
            Ok(address)
        })?;
        Ok(Place { arriving, address })
    }
}

impl Network for Memory {
    fn connect(&self, address: String) -> BoxFuture<BoxIo, TransportError> {
        let place = self.with(|places| places.open.get(&address).cloned());
        Box::pin(async move {
            let (ours, theirs) = duplex(BUFFER);
            let nobody = || TransportError::Connect {
                address: address.clone(),
                message: "nobody listens there".to_owned(),
            };
            place.ok_or_else(nobody)?.send(theirs).await.map_err(|_| nobody())?;
            Ok(Box::new(ours) as BoxIo)
        })
    }

    fn listen(&self, address: String) -> BoxFuture<Box<dyn Accept>, TransportError> {
        let place = self.open(address);
        Box::pin(async { Ok(Box::new(place?) as Box<dyn Accept>) })
    }
}

struct Place {
    arriving: mpsc::Receiver<DuplexStream>,
    address: String,
}

impl Accept for Place {
    fn accept(&mut self) -> Accepted<'_> {
        Box::pin(async {
            match self.arriving.recv().await {
                Some(stream) => Ok((Box::new(stream) as BoxIo, "memory".to_owned())),
                // The network's own sender lives until somebody takes the address over.
                None => std::future::pending().await,
            }
        })
    }

    fn address(&self) -> String {
        self.address.clone()
    }
}

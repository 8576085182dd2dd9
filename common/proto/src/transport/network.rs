//! What a network has to do: connect to an address, wait at one.

use super::TransportError;
use std::io;
use std::pin::Pin;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::codegen::BoxFuture;

/// Two directions of bytes.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// Any connection.
pub type BoxIo = Box<dyn Io>;

/// Something that carries connections between addresses.
pub trait Network: Send + Sync + 'static {
    /// Connects once.
    fn connect(&self, address: String) -> BoxFuture<BoxIo, TransportError>;

    /// Takes an address for as long as the result lives.
    fn listen(&self, address: String) -> BoxFuture<Box<dyn Accept>, TransportError>;
}

/// A connection to come, and the place it comes from.
pub type Accepted<'a> = Pin<Box<dyn Future<Output = io::Result<(BoxIo, String)>> + Send + 'a>>;

/// An address where connections arrive.
pub trait Accept: Send + Sync + 'static {
    /// The next connection, and what identifies the place it comes from (connections are counted by place). Must be
    /// safe to drop and call again.
    fn accept(&mut self) -> Accepted<'_>;

    /// Where others reach it, with the port that was taken.
    fn address(&self) -> String;
}

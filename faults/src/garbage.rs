//! What nobody should send: noise, and messages far larger than allowed.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::{BufMut, Bytes, BytesMut};

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// How a server answered a call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// `grpc-status`, if it came so far.
    pub status: Option<u32>,
    /// `grpc-message`.
    pub message: String,
    /// The transport's error, if it broke the call off.
    pub broken: String,
}

/// Sends `bytes` on a connection of its own, reads for at most `listen`, hangs up. A server that hangs up first is fine.
///
/// # Errors
/// If there is no connection to be had.
pub fn throw(address: SocketAddr, bytes: &[u8], listen: Duration) -> Result<Vec<u8>> {
    let mut stream =
        TcpStream::connect_timeout(&address, PATIENCE).with_context(|| format!("connection to {address}"))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(listen.max(Duration::from_millis(1))))?;
    let mut answer = vec![0; 4096];
    if stream.write_all(bytes).is_err() {
        return Ok(Vec::new());
    }
    let read = stream.read(&mut answer).unwrap_or(0);
    answer.truncate(read);
    Ok(answer)
}

/// Calls a method, as gRPC over plaintext, with one message of `size` zero bytes that announces its size.
///
/// # Errors
/// If there is no connection to be had.
pub fn oversized_call(address: SocketAddr, path: &str, size: u32) -> Result<Reply> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let called = tokio::time::timeout(PATIENCE, call(address, path, size)).await;
        called.unwrap_or_else(|_| Ok(Reply { broken: "no answer".into(), ..Reply::default() }))
    })
}

async fn call(address: SocketAddr, path: &str, size: u32) -> Result<Reply> {
    let stream = tokio::net::TcpStream::connect(address).await?;
    let (client, connection) = h2::client::handshake(stream).await?;
    let connection = tokio::spawn(connection);
    let reply = exchange(client, address, path, size).await;
    connection.abort();
    Ok(reply.unwrap_or_else(|error| Reply { broken: format!("{error:#}"), ..Reply::default() }))
}

async fn exchange(
    client: h2::client::SendRequest<Bytes>,
    address: SocketAddr,
    path: &str,
    size: u32,
) -> Result<Reply> {
    let request = http::Request::post(format!("http://{address}{path}"));
    let request = request.header("content-type", "application/grpc").header("te", "trailers").body(())?;
    let (response, mut body) = client.ready().await?.send_request(request, false)?;
    // The rest may be refused while it is sent; what counts is the answer.
    let send = async {
        let _ = body.send_data(announced(size), false);
        let mut left = size as usize;
        while left > 0 {
            body.reserve_capacity(left.min(1 << 20));
            let Some(Ok(room)) = std::future::poll_fn(|cx| body.poll_capacity(cx)).await else { return };
            let room = room.min(left);
            if room > 0 && body.send_data(Bytes::from(vec![0; room]), room == left).is_err() {
                return;
            }
            left -= room;
        }
    };
    let receive = async {
        let response = response.await?;
        if let Some(reply) = reply_in(response.headers()) {
            return Ok(reply);
        }
        let mut incoming = response.into_body();
        while let Some(data) = incoming.data().await {
            let _ = incoming.flow_control().release_capacity(data?.len());
        }
        let trailers = incoming.trailers().await?.unwrap_or_default();
        anyhow::Ok(reply_in(&trailers).unwrap_or_default())
    };
    tokio::pin!(receive);
    tokio::select! {
        reply = &mut receive => reply,
        () = send => receive.await,
    }
}

/// The five bytes before a gRPC message.
fn announced(size: u32) -> Bytes {
    let mut head = BytesMut::new();
    head.put_u8(0);
    head.put_u32(size);
    head.freeze()
}

fn reply_in(headers: &http::HeaderMap) -> Option<Reply> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let status = text("grpc-status")?.parse().ok();
    Some(Reply { status, message: text("grpc-message").unwrap_or_default().into(), broken: String::new() })
}

//! Generated from `proto/halfstep.proto`.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated code; the proto file has the comments"
)]

tonic::include_proto!("halfstep.v1");

//! Generates services and messages from `proto/halfstep.proto`, without a `protoc` on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/halfstep.proto");
    let descriptors = protox::compile(["halfstep.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // Chunks stay views of the received frame instead of copies.
        .bytes(".halfstep.v1.BlobChunk.data")
        .compile_fds(descriptors)?;
    Ok(())
}

//! ONNX models: read, list layers, cut stages, rewrite, write.

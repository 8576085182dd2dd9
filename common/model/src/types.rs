//! Element types of tensors inside a graph.

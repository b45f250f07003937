"""A gRPC server for sentence embeddings and reranking, and the benchmark that measures it."""

__version__ = "0.1.0"

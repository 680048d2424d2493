"""The engine: continuous batching of requests, each with its own adapter, over one resident model. Knows no gRPC."""

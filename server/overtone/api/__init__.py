"""The gRPC front: services, conversion, errors, metrics, configuration and the command line."""

"""Tables of the autoencoder, one module a part; `python -m benchmarks.autoencoder_tables` runs them."""

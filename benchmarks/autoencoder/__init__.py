"""Tables of the autoencoder on a zoo, one module a table. One thread, no Ray; nothing is chosen on test models."""

"""The floor that knows Ray Train and Ray Tune: session, distributed training, sweeps."""

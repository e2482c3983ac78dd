"""`python -m kernels.bench OP`: an op beside its peers on one GPU, in one run: table, JSON and plot."""

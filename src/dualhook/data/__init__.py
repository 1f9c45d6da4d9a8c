"""A small subset of Fashion-MNIST that ships with the package (Zalando Research 2017, MIT licence)."""

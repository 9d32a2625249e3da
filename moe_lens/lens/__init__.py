"""A model opened for reading and intervening."""
